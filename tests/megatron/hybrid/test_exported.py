"""Tools that read a HybridModel, as a checkpoint and as its export."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tools.export.models import MODELS, flags, shaken
from tests.training_runs import make_saving_fast

pytestmark = pytest.mark.long

_TEXT = "7 8 9 7 7 3 500 12"


def _saved_and_read(folder):
    """What `evaluate` says of a data set; tables of what was read, of both forms."""
    from ultramem_megatron.data import indexed
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.evaluate.__main__ import main as evaluate
    from ultramem_megatron.tools.export.__main__ import main as export
    from ultramem_megatron.tools.inspect.__main__ import main as inspect

    make_saving_fast()
    model, args = untrained_model(flags(MODELS["hybrid"]))
    shaken(model)
    load = str(folder / "checkpoint")
    save_weights(model, args, folder / "checkpoint")
    export(["--load", load, "--to", "hf", f"{folder}/hf"])
    (folder / "text.txt").write_text(_TEXT)
    for form in ("checkpoint", "hf"):
        words = ["--load", f"{folder}/{form}", "--text", f"{folder}/text.txt"]
        inspect([*words, "--out", f"{folder}/read_{form}"])
    indexed.write(folder / "data", [np.arange(33).tolist()], 512)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate(["--load", load, "--data", f"{folder}/data", "--window", "16"])
    return json.loads(out.getvalue())


def test_inspection_and_evaluation_read_what_the_export_computes(tmp_path):
    from ultramem_megatron.tools.export.opened_folder import open_folder

    found = run_on_ranks(1, _saved_and_read, tmp_path)[0]
    for name in ("fired.csv", "shared.csv", "grid.csv"):
        ours, theirs = (tmp_path / f"read_{form}" / name for form in ("checkpoint", "hf"))
        assert ours.read_text() == theirs.read_text(), name
    model = open_folder(tmp_path / "hf").model
    windows = torch.arange(32).view(2, 16)
    loss = torch.nn.functional.cross_entropy(
        model(windows).logits.flatten(0, 1), windows.flatten() + 1
    )
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
