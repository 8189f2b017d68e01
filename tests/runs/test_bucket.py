"""Runs whose workdir is the URL of a bucket, against emulators of such stores on this machine."""

import json
import re
import signal
import socket
import types

import pytest

from tests.helpers import forks
from tests.helpers import tiny_run as tiny

RUN = "bucket/runs/tiny"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def with_variables(variables):
    """A function that runs a command line with these environment variables, and gives what it printed."""

    def llm3(*command, then=(), point="", status=0):
        """`then` is another command."""
        commands = [[str(each) for each in some] for some in (command, then) if some]
        arguments = [point, json.dumps(commands)]
        fork = forks.Fork(arguments, variables)
        output, error = fork.communicate(tiny.ENDS_WITHIN)
        assert fork.returncode == status, output + error
        return " ".join((output + error).split())

    return llm3


@pytest.fixture(scope="module")
def llm3():
    """Runs commands with an emulator of Google Cloud Storage; `llm3.store` is its file system."""
    gcsfs = pytest.importorskip("gcsfs.core")  # the class that asks for nothing but HTTP
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", port := free_port(), in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://127.0.0.1:{port}"
    variables = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), address)
    llm3 = with_variables(variables | {"FSSPEC_GCS_TOKEN": "anon"})
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    llm3.store = gcsfs.GCSFileSystem(token="anon", endpoint_url=address, **options)
    yield llm3
    server.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run of two stages in a local directory, of which the second one saves delta checkpoints, and its config."""
    base = tmp_path_factory.mktemp("local")
    tiny.write_texts(base / "texts")
    lines = "del c.stages.finetune, c.stages.scratch, c.evaluations.domain, c.evaluations.task\n"
    lines += "c.stages.posttrain.train = 'layers[-1:]/.*'"
    command = ("run", f"--config={tiny.write_config(base / 'config.py', base, lines)}")
    workdir = base / "run"
    tiny.process((*command, f"--workdir={workdir}"))
    return types.SimpleNamespace(command=command, workdir=workdir)


@pytest.fixture
def llm3_with_s3():
    """The same with an emulator of S3."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port := free_port(), verbose=False)
    server.start()
    address = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    llm3 = with_variables(keys | {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"})
    llm3.store = s3fs.S3FileSystem(key="key", secret="secret", endpoint_url=address, use_listings_cache=False)
    llm3.store.mkdir("bucket")
    yield llm3
    server.stop()


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_resumes_and_ends_with_the_bits_of_a_local_one(llm3, local):
    """Both are amended in the end from an earlier step on."""
    run, there = local.command, f"--workdir=gs://{RUN}"
    llm3(*run, there, point="SIGKILL@saved:posttrain:8", status=-signal.SIGKILL)
    again = llm3(*run, there, then=(*run, there))
    assert re.search("posttrain: resumes at step 8 ", again), again
    assert f"Report: gs://{RUN}/report.html" in again
    assert f"Nothing left to do: pretrain, posttrain are finished. See gs://{RUN}" in again
    amended = ("--amend=slower", "--from_step=8", "--config.stages.posttrain.optimizer.learning_rate=0.005")
    for workdir in (there, f"--workdir={local.workdir}"):
        llm3(*run, workdir, *amended, "--stages=posttrain")
    matrix = json.loads(llm3.store.cat_file(f"{RUN}/matrix.json"))
    assert {row["stage"]: row["params_digest"] for row in matrix["rows"]} == tiny.digests(local.workdir)
    stage, here = f"{RUN}/posttrain", local.workdir / "posttrain"
    lines = llm3.store.cat_file(f"{stage}/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [line["step"] for line in tiny.metrics(here)]
    kept = {name: {each.name for each in (here / name).iterdir()} for name in ("checkpoints", "base")}
    kept["set_aside/1/checkpoints"] = {"10"}
    for name, steps in kept.items():
        assert {each.rpartition("/")[2] for each in llm3.store.ls(f"{stage}/{name}", detail=False)} == steps
    generate = ("generate", there, "--stage=posttrain", "--prompt=The", "--max_tokens=2")
    said = llm3("lineage", there, then=generate)
    assert f"gs://{RUN}/posttrain step 10" in said and "2 tokens" in said
    assert not llm3.store.exists(f"{RUN}/.lock")


@pytest.mark.slow
def test_a_run_elsewhere_starts_from_one_in_a_bucket_and_reads_its_data_there(llm3, tmp_path):
    """The data comes from the bucket too. Uses the run of the test above."""
    tiny.write_texts(tmp_path / "texts")
    for split in ("train", "validation", "test"):
        name = f"task-{split}.jsonl"
        llm3.store.pipe_file(f"bucket/texts/{name}", (tmp_path / "texts" / name).read_bytes())
    start = f"dict(run='gs://{RUN}', stage='posttrain', fresh=['head/.*'])"
    lines = "del c.stages.pretrain, c.stages.posttrain, c.stages.scratch, c.evaluations.domain, c.evaluations.general\n"
    lines += f"c.stages.finetune.start = {start}\n"
    lines += "files = {split: f'gs://bucket/texts/task-{split}.jsonl' for split in ('train', 'validation', 'test')}\n"
    lines += "c.sources = dict(task=dict(path='json', data_files=files, label='label'))"
    config = tiny.write_config(tmp_path / "config.py", tmp_path, lines)
    workdir = f"--workdir={tmp_path / 'child'}"
    lineage = llm3("run", f"--config={config}", workdir, then=("lineage", workdir))
    assert f"gs://{RUN}/pretrain step 10" in lineage and f"gs://{RUN}/posttrain step 10" in lineage
    assert "gone" not in lineage
    assert f"right gs://{RUN}" in llm3("compare", tmp_path / "child", f"gs://{RUN}")


@pytest.mark.slow
def test_a_killed_run_in_s3_resumes_and_ends_with_the_bits_of_a_local_one(llm3_with_s3, local):
    run, there = (*local.command, "--stages=pretrain"), f"--workdir=s3://{RUN}"
    llm3_with_s3(*run, there, point="SIGKILL@log:pretrain:10", status=-signal.SIGKILL)
    again = llm3_with_s3(*run, there, then=("lineage", there))
    assert re.search("pretrain: resumes at step [48] ", again), again
    assert f"s3://{RUN}/pretrain step 10" in again
    matrix = json.loads(llm3_with_s3.store.cat_file(f"{RUN}/matrix.json"))
    expected = {stage: tiny.digests(local.workdir)[stage] for stage in ("init", "pretrain")}
    assert {row["stage"]: row["params_digest"] for row in matrix["rows"]} == expected
    steps = {each.name for each in (local.workdir / "pretrain" / "checkpoints").iterdir()}
    kept = llm3_with_s3.store.ls(f"{RUN}/pretrain/checkpoints", detail=False)
    assert {each.rpartition("/")[2] for each in kept} == steps
    assert not llm3_with_s3.store.exists(f"{RUN}/.lock")
