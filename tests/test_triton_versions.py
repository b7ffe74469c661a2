"""The default tiles of flash attention compile within every limit with the oldest and the newest known Triton.

Each version of tests/triton_versions.txt is installed once, below .cache/triton, and used with the torch of this
environment. ``KVOPS_NEWEST_TRITON=1`` adds the newest that the package index has, which nobody may have looked at yet.
"""

import os

import pytest
from compile_exceptions import unexpected_problems
from compiled import OF_OTHER_VERSIONS, OTHER_VERSIONS, record, report, unrecorded

from kvops.autotune.environments import UnreachableIndexError, environment, newest_triton

VERSIONS = (*OTHER_VERSIONS, *(["newest"] if os.environ.get("KVOPS_NEWEST_TRITON") == "1" else ()))

pytestmark = [pytest.mark.triton_versions, pytest.mark.compile]


@pytest.mark.parametrize("version", VERSIONS)
def test_default_flash_tiles_keep_the_limits_with(version):
    try:
        version = newest_triton() if version == "newest" else version
        rows = [row for only, targets in OF_OTHER_VERSIONS for row in report(targets, only, version)]
    except UnreachableIndexError as error:
        pytest.skip(str(error))
    assert {row["triton"] for row in rows} == {version}
    for head_dim in (64, 128, 256):
        for target in ",".join(targets for _, targets in OF_OTHER_VERSIONS).split(","):
            assert {
                launch["kernel"]
                for row in rows
                for launch in row["launches"]
                if row["target"] == target and row["case"] == f"flash-bf16-d{head_dim}-window"
            } >= {"flash_forward_kernel", "flash_backward_keys_kernel", "flash_backward_queries_kernel"}
    problems = unexpected_problems(rows)
    assert not problems, f"Triton {version}\n" + "\n".join(problems)
    if version in record():
        wrong = unrecorded(rows)
        assert not wrong, f"Triton {version}: make prune records what changed\n" + "\n".join(wrong)


def test_a_version_that_the_index_does_not_have_is_refused(tmp_path):
    try:
        with pytest.raises(ValueError, match=r"triton==0\.0\.1"):
            environment("0.0.1", tmp_path)
    except UnreachableIndexError as error:
        pytest.skip(str(error))
    assert not list(tmp_path.iterdir())


def test_an_index_out_of_reach_is_told_from_a_version_that_does_not_exist(tmp_path, monkeypatch):
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(UnreachableIndexError, match="cannot be reached"):
        newest_triton()
