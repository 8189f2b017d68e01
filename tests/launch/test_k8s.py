"""The Kubernetes manifests: valid by the schemas of Kubernetes and of JobSet, and consistent in themselves."""

import copy
import re
from pathlib import Path

import pytest

from llm3.distributed.processes import detect
from llm3.errors import Exit

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
JOBSET_SCHEMA = ROOT / "tests" / "data" / "fixtures" / "schemas" / "jobset-crd.yaml"
MANIFESTS = sorted((ROOT / "launch" / "k8s").glob("*.yaml"))


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request):
    """{kind: object} of one file."""
    return {each["kind"]: each for each in yaml.safe_load_all(request.param.read_text())}


def job(manifest) -> dict:
    """The spec of the jobs in a JobSet, each of which is a process per pod."""
    [replicated] = manifest["JobSet"]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(manifest) -> dict:
    [found] = job(manifest)["template"]["spec"]["containers"]
    return found


def closed(schema):
    """A schema that refuses what it does not name."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        free = schema.keys() & {"additionalProperties", "x-kubernetes-preserve-unknown-fields"}
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not free:
            schema["additionalProperties"] = False
    elif isinstance(schema, list):
        schema = [closed(each) for each in schema]
    return schema


@pytest.fixture(scope="module")
def jobset_errors():
    """The errors of a JobSet by its own schema."""
    jsonschema = pytest.importorskip("jsonschema")
    [version] = yaml.safe_load(JOBSET_SCHEMA.read_text())["spec"]["versions"]
    assert version["name"] == "v1alpha2"
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(schema)
    return lambda jobset: [f"{error.json_path}: {error.message}" for error in validator.iter_errors(jobset)]


def test_a_jobset_fits_its_schema(manifest, jobset_errors):
    assert jobset_errors(manifest["JobSet"]) == []
    misspelt = copy.deepcopy(manifest["JobSet"])
    misspelt["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    assert len(jobset_errors(misspelt)) == 1, "the schema refuses what it does not know"


@pytest.mark.parametrize(
    ("stem", "blocks"), [("jobset-gpu", "hf|rdma"), ("jobset-gpu", "hf|tcpx"), ("jobset-tpu", "hf|slices")]
)
def test_commented_blocks_fit_the_schemas_once_their_mark_is_removed(stem, blocks, jobset_errors):
    kubernetes = pytest.importorskip("kubernetes_validate")
    text = (ROOT / "launch" / "k8s" / f"{stem}.yaml").read_text()
    used, count = re.subn(rf"^#({blocks}) ", "", text, flags=re.MULTILINE)
    parsed = {each["kind"]: each for each in yaml.safe_load_all(used)}
    assert jobset_errors(parsed["JobSet"]) == []
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": job(parsed)["template"]["spec"]}
    kubernetes.validate(pod, kubernetes.latest_version(), strict=True)
    own = container(parsed)
    mounted = {each["name"] for each in own["volumeMounts"]}
    for each in pod["spec"].get("initContainers", []):
        mounted |= {mount["name"] for mount in each["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["spec"]["volumes"]}
    hf = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    assert count > 1 and hf in own["env"]
    if "rdma" in blocks:
        assert own["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/ib": 1}
    if "tcpx" in blocks:
        [daemon] = pod["spec"]["initContainers"]
        annotations = job(parsed)["template"]["metadata"]["annotations"]
        assert len(yaml.safe_load(annotations[f"devices.gke.io/container.{daemon['name']}"])) == 10
        devices = [each["interfaceName"] for each in yaml.safe_load(annotations["networking.gke.io/interfaces"])]
        named = {each["name"]: each.get("value") for each in own["env"]}
        assert devices[1:] == named["NCCL_GPUDIRECTTCPX_SOCKET_IFNAME"].split(",")
    if "slices" in blocks:
        assert "--config.mesh.across_hosts=data" in own["args"]


def test_claims_and_the_jobs_in_a_jobset_fit_the_schemas_of_kubernetes(manifest):
    kubernetes = pytest.importorskip("kubernetes_validate")
    metadata = {"name": "job"}
    for each in (
        manifest["PersistentVolumeClaim"],
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job(manifest)},
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": job(manifest)["template"]["spec"]},
    ):
        kubernetes.validate(each, kubernetes.latest_version(), strict=True)
        with pytest.raises(kubernetes.ValidationError, match="misspelt"):
            kubernetes.validate(
                each | {"spec": each["spec"] | {"misspelt": 0}}, kubernetes.latest_version(), strict=True
            )


def test_a_run_that_says_what_became_of_it_is_taken_at_its_word(manifest):
    """Stopped: it restarts for ever. Bad input and the like: it fails. All else: it restarts a few times."""
    policy, rules = manifest["JobSet"]["spec"]["failurePolicy"], job(manifest)["podFailurePolicy"]["rules"]
    assert job(manifest)["backoffLimit"] == 0 and policy["maxRestarts"] > 0
    assert job(manifest)["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy wants it"
    by_code = next(rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)
    assert by_code["containerName"] == container(manifest)["name"]

    def action(code: int) -> str:
        if code not in by_code["values"]:
            return "RestartJobSet"
        message = f"Container llm3 for pod default/a-pod failed with exit code {code} matching FailJob rule at index 0"
        for rule in policy["rules"]:
            if any(re.search(each, message) for each in rule.get("onJobFailureMessagePatterns", [""])):
                return rule["action"]

    assert {code: action(code) for code in Exit if code} == {
        Exit.PREEMPTED: "RestartJobSetAndIgnoreMaxRestarts",
        Exit.BAD_INPUT: "FailJobSet",
        Exit.DIVERGED: "FailJobSet",
        Exit.NOT_WRITTEN: "FailJobSet",
        Exit.PARTIAL: "FailJobSet",
        Exit.HUNG: "RestartJobSet",
        Exit.UNREACHABLE: "RestartJobSet",
    }


def test_the_volume_of_the_workdir_is_claimed_and_lasts(manifest):
    pod = job(manifest)["template"]["spec"]
    claims = {each["name"]: each["persistentVolumeClaim"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
    [mount] = [each for each in container(manifest)["volumeMounts"] if each["name"] in claims]
    assert claims[mount["name"]]["claimName"] == manifest["PersistentVolumeClaim"]["metadata"]["name"]
    assert f"--workdir={mount['mountPath']}/quickstart" in container(manifest)["args"]
    assert {"name": "LLM3_CACHE_DIR", "value": f"{mount['mountPath']}/cache"} in container(manifest)["env"]
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_what_its_pods_find_in_their_environment_makes_them_one_run(manifest):
    variables = {each["name"]: each.get("value", "0") for each in container(manifest)["env"]}  # 0: of the first pod
    hosts = [f"host-{i}" for i in range(job(manifest)["completions"])]
    if "google.com/tpu" in container(manifest)["resources"]["limits"]:
        variables |= {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": "0"}  # as GKE sets them
        expected = f"TPU: worker 0 of {len(hosts)}"
    else:
        name = manifest["JobSet"]["metadata"]["name"]
        [replicated] = manifest["JobSet"]["spec"]["replicatedJobs"]
        expected = f"process 0 of {len(hosts)}, coordinator {name}-{replicated['name']}-0-0.{name}:29400"
    assert job(manifest)["parallelism"] == len(hosts)
    assert detect(variables).found == expected


def test_the_next_stage_is_the_same_file_with_another_name(manifest):
    text = yaml.safe_dump(manifest["JobSet"]).replace("pretrain", "posttrain")
    assert "--stages=posttrain" in container({"JobSet": yaml.safe_load(text)})["args"]
    assert yaml.safe_load(text)["metadata"]["name"] == "llm3-posttrain"
