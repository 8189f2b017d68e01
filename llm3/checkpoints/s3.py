"""Lets Orbax write arrays to S3 by TensorStore's driver for it: Orbax only knows the one for Google Cloud Storage."""

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils  # neither has a public name
from orbax.checkpoint._src.serialization import tensorstore_utils

SCHEME = "s3://"


@functools.cache
def let_orbax_write_there() -> None:
    """Change the functions of Orbax that choose TensorStore's driver by the beginning of a path."""
    chosen, normalized, store = (
        tensorstore_utils._use_gcs_driver,
        tensorstore_utils._normalize_path,
        gcs_utils.get_kvstore_for_gcs,
    )
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(SCHEME) or chosen(path)
    tensorstore_utils._normalize_path = lambda path: normalized(path).replace("s3:/", SCHEME)
    gcs_utils.get_kvstore_for_gcs = lambda path: specification(path) if path.startswith(SCHEME) else store(path)


def specification(path: str) -> dict[str, Any]:
    """TensorStore's description of a URL as a key-value store, by the variables that the tools of AWS read, too."""
    bucket, _, key = path.removeprefix(SCHEME).partition("/")
    found = {"driver": "s3", "bucket": bucket, "path": key}
    given = os.environ.get
    if endpoint := given("AWS_ENDPOINT_URL_S3") or given("AWS_ENDPOINT_URL"):
        found |= {"endpoint": endpoint, "aws_region": given("AWS_REGION") or given("AWS_DEFAULT_REGION", "us-east-1")}
    return found
