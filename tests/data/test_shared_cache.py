"""Several runs that build one cache of data sets at the same time."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.data.test_check import _write
from tests.training_runs import run_pretrain, tiny_gpt


@pytest.mark.long
def test_runs_that_share_a_cache_train_as_one_alone(tmp_path):
    cache = tmp_path / "cache"
    flags = tiny_gpt(mock_data=None, train_data_path=_write(tmp_path / "text", 60), train_iters=20)
    alone = run_pretrain(1, flags).losses
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            shared = [*flags, "--data-cache-path", str(cache)]
            runs = list(pool.map(lambda _, flags=shared: run_pretrain(1, flags).losses, range(3)))
        assert runs == [alone] * 3
        shutil.rmtree(cache)
