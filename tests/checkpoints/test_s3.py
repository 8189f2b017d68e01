"""Orbax, and through it TensorStore, finds checkpoints in S3."""

import pytest
import tensorstore
from orbax.checkpoint._src.serialization.tensorstore_utils import build_kvstore_tspec

from llm3.checkpoints.layout import for_orbax
from llm3.checkpoints.s3 import let_orbax_write_there


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    let_orbax_write_there()


def driver(directory, **options):
    spec = build_kvstore_tspec(directory, use_ocdbt=False, **options)
    tensorstore.KvStore.Spec(spec)  # valid
    return spec["driver"]


def test_each_place_has_its_driver(tmp_path):
    assert driver("s3://bucket/run/checkpoints/1/params") == "s3"
    assert driver("gs://bucket/run/checkpoints/1/params") == "gcs"
    assert driver(str(tmp_path)) == "file"
    assert str(for_orbax(tmp_path)) == str(tmp_path)


def test_the_variables_of_aws_name_another_store_than_that_of_amazon(monkeypatch):
    place = {"driver": "s3", "bucket": "bucket", "path": "run/params"}
    assert build_kvstore_tspec("s3://bucket/run/params/", use_ocdbt=False) == place
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    other = {"endpoint": "http://minio:9000", "aws_region": "us-east-1"}
    assert build_kvstore_tspec("s3://bucket/run", "params", use_ocdbt=False) == place | other
