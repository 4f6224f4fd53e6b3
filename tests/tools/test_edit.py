"""Editing values: what is listed is what is added, and the named rows change and nothing else."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tools.facts import CAPITALS, prompt, trained_folder
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.edit.__main__ import main
from ultramem_megatron.tools.edit.contributions import contributions
from ultramem_megatron.tools.edit.edits import Edit
from ultramem_megatron.tools.edit.fact import read_fact, said
from ultramem_megatron.tools.edit.write import write_edited
from ultramem_megatron.tools.export.opened_folder import open_folder
from ultramem_megatron.tools.quantize import quantize

_FRANCE = ["--prompt", prompt("France"), "--fact", " Paris"]
_STEM = "model.layers.0.memory.values."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf, and from it int8 and bf16."""
    folder = tmp_path_factory.mktemp("facts")
    torch.manual_seed(0)
    trained_folder(folder / "hf")
    quantize(folder / "hf", folder / "int8", "int8", None)
    open_folder(folder / "hf").model.to(torch.bfloat16).save_pretrained(folder / "bf16")
    return folder


def _log_probabilities(folder):
    opened = open_folder(folder)
    facts = {c: read_fact(opened, prompt(c), f" {capital}") for c, capital in CAPITALS.items()}
    return {country: said(opened, fact, 1).log_probability for country, fact in facts.items()}


def test_a_fact_goes_with_its_values_and_others_stay(folder, tmp_path, capsys):
    main([str(folder / "hf"), str(tmp_path / "out"), *_FRANCE, "--zero-most", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert "before: the prompt goes on 'Paris <end>'" in lines
    after = next(line for line in lines if line.startswith("after: the prompt goes on"))
    assert "Paris" not in after
    before, edited = _log_probabilities(folder / "hf"), _log_probabilities(tmp_path / "out")
    lost = {country: before[country] - edited[country] for country in CAPITALS}
    assert min(before.values()) > -1
    assert lost.pop("France") > 2
    assert sum(lost.values()) / len(lost) < 0.1


@pytest.mark.parametrize(("bits", "block"), [("int8", None), ("fp8", None), ("fp8", 8)])
def test_tables_in_8_bits_lose_no_fact(folder, tmp_path, bits, block):
    quantize(folder / "hf", tmp_path / "out", bits, block)
    before, after = _log_probabilities(folder / "hf"), _log_probabilities(tmp_path / "out")
    assert min(after.values()) > -0.69  # likelier than all else
    lost = sum(before.values()) - sum(after.values())
    assert abs(lost) / len(CAPITALS) < 2e-3


@pytest.mark.parametrize("kind", ["hf", "int8"])
def test_a_share_is_what_the_output_lacks_without_the_value(folder, kind):
    opened = open_folder(folder / kind)
    fact = read_fact(opened, prompt("Italy"), " Rome")
    fired = contributions(opened, fact)
    assert sum(one.share for one in fired) == pytest.approx(1, abs=1e-5)
    assert [one.share for one in fired] == sorted((one.share for one in fired), reverse=True)
    memory = opened.model.model.layers[0].memory
    table = memory.values.scales if kind == "int8" else memory.values.weight
    with torch.no_grad():
        whole = _output(opened, fact)
        for one in fired[:3]:
            kept = table[one.value].clone()
            table[one.value] = 0
            missing = whole - _output(opened, fact)
            table[one.value] = kept
            share = (missing @ whole) / (whole @ whole)
            assert one.share == pytest.approx(float(share), abs=1e-5)


def _output(opened, fact):
    """(D,): what the memory adds where the capital is said."""
    found = []
    memory = opened.model.model.layers[0].memory
    hook = memory.register_forward_hook(lambda _, __, out: found.append(out[0, fact.start - 1]))
    opened.model(torch.tensor([fact.ids]))
    hook.remove()
    return found[0]


_EDITS = [Edit(1, 7, factor=0.0), Edit(1, 2303, factor=-0.5), Edit(1, 8, source=7)]


@pytest.mark.parametrize("kind", ["hf", "int8", "bf16"])
def test_the_named_rows_change_and_nothing_else(folder, tmp_path, kind):
    held = {file.name: file.read_bytes() for file in (folder / kind).iterdir()}
    write_edited(folder / kind, tmp_path / "out", _EDITS)
    assert {file.name: file.read_bytes() for file in (folder / kind).iterdir()} == held
    for file in (tmp_path / "out").glob("*.safetensors"):
        before, after = load_file(folder / kind / file.name), load_file(file)
        for name, tensor in before.items():
            assert torch.equal(after[name], _expected(name, tensor)), name
    if kind == "hf":
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
        assert "- layer 1, value 7: times 0\n" in (tmp_path / "out/README.md").read_text()
    for line in (tmp_path / "out/SHA256SUMS").read_text().splitlines():
        wanted, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == wanted
    assert {*held, "SHA256SUMS"} == {file.name for file in (tmp_path / "out").iterdir()}


def _expected(name, tensor):
    if not name.startswith(_STEM):
        return tensor
    tensor = tensor.clone()
    tensor[8] = tensor[7]
    if not name.endswith("codes"):
        tensor[7] = 0
        tensor[2303] *= -0.5
    return tensor


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["OUT"], "nothing to write, no value is named"),
        (["--zero", "1:7"], "nothing is changed in place"),
        (["OUT", "--zero", "1:2304"], "the table of layer 1 has values 0 to 2303"),
        (["OUT", "--replace", "1:7=2304"], "1:2304: the table of layer 1 has values 0 to"),
        (["OUT", "--zero", "2:7"], "layer 2 has no memory. There are memories in layers 1"),
        (["OUT", "--zero", "7"], "--zero 7: a value is LAYER:VALUE"),
        (["OUT", "--zero", "1:7", "--scale", "1:7=2"], "1:7 is named 2 times"),
        (["OUT", "--scale", "1:7=nan"], "'nan' is no factor"),
        (["OUT", "--scale", "1:7"], "give the value and a factor"),
        (["OUT", "--scale", "1:7=1e39"], "1:7 times 1e+39 is beyond torch.float32"),
        (["OUT", "--zero-most", "-1"], "--zero-most -1: must be a whole number >= 0"),
        (["FULL", "--zero", "1:7"], "holds mine.txt already. Choose another folder"),
        (["OUT", "--zero", "1:7", "--fact", ""], "--fact '': no tokens in it"),
        (["OUT", "--zero", "1:7", "--prompt", ""], "--prompt '': no token of its own"),
        (["OUT", "--zero", "1:7", "--fact", " of" * 20], "are 23 tokens; the model has 16"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_a_line(folder, tmp_path, words, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    given = [str(folder / "hf"), *(places.get(word, word) for word in words)]
    with pytest.raises(UltraMemError) as raised:
        main([*_FRANCE, *given])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_is_named_is_not_switched_off_besides(folder, tmp_path):
    opened = open_folder(folder / "hf")
    first, second = contributions(opened, read_fact(opened, prompt("France"), " Paris"))[:2]
    words = ["--zero-most", "2", "--scale", f"1:{first.value}=2"]
    main([str(folder / "hf"), str(tmp_path / "out"), *_FRANCE, *words])
    was, now = (
        open_folder(where).model.model.layers[0].memory.values.weight
        for where in (folder / "hf", tmp_path / "out")
    )
    assert torch.equal(now[first.value], was[first.value] * 2)
    assert not now[second.value].any()


def test_a_list_alone_writes_nothing(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main([str(folder / "hf"), *_FRANCE, "--top", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "%" in line]) == 3
    assert not list(Path().iterdir())


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    planted = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for file in (*(tmp_path / "hf").glob("*.py"), tmp_path / "hf/tokenizer_mine.py"):
        file.write_text(planted)
    main([str(tmp_path / "hf"), *_FRANCE])
    settings = tmp_path / "hf/tokenizer_config.json"
    wanted = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenizer_mine.Mine"] * 2}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **wanted}))
    with pytest.raises(UltraMemError, match=r"The tokenizer in .* cannot be opened"):
        main([str(tmp_path / "hf"), *_FRANCE])
    assert not (tmp_path / "ran").exists()
