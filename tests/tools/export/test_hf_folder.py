"""What an exported folder holds, what is refused, and what is read back from it."""

import contextlib
import dataclasses
import functools
import json
import resource

import pytest
import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.tools.edit.edits import Edit
from ultramem_megatron.tools.edit.write import write_edited
from ultramem_megatron.tools.export.__main__ import main
from ultramem_megatron.tools.export.files import save_plain
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import load_hf, save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.export.huggingface import hf_config
from ultramem_megatron.tools.export.opened_folder import open_folder
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT
from ultramem_megatron.tools.quantize import quantize


def _plain(num_keys=8, value_dim=8, **others):
    sizes = {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 8}
    table = {"num_keys": num_keys, "value_dim": value_dim}
    memory = UltraMemConfig(spans=(Span(1, 2),), key_dim=8, topk=4, **table, **others)
    plain = PlainGPT(
        PlainConfig(
            **sizes,
            vocab_size=50,
            num_layers=2,
            hidden_size=16,
            ffn_hidden_size=24,
            max_positions=16,
            ultramem=memory,
        )
    )
    for name, tensor in plain.named_parameters():
        if ".memory." not in name:
            tensor.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return plain.eval()


def test_weights_come_in_files_of_a_size_and_back(tmp_path):
    plain = _plain()
    save_hf(plain, tmp_path / "out", HFTokenizer(), "card", shard="10KB")
    weights = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(weights) > 2
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    back, flags_kept = load_hf(tmp_path / "out")
    assert back.config == plain.config
    assert flags_kept == {"tokenizer_type": None, "tokenizer_model": None}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--load a --to hf b --max-shard-size 10kB", "'10kB' is no size such as 500MB or 2GB"),
        ("--load a --to b --max-shard-size 10KB", "--max-shard-size is for --to hf OUT"),
        ("--from hf a --save b --max-shard-size 10KB", "--max-shard-size is for --to hf OUT"),
    ],
)
def test_sizes_of_files_that_cannot_be_are_refused(words, message):
    with pytest.raises(UltraMemError, match=message):
        main(words.split())


def test_the_size_of_files_comes_from_the_flag(tmp_path, monkeypatch):
    """Of `_plain`, in the place of a checkpoint's model."""
    command = "ultramem_megatron.tools.export.__main__"
    found = type("Found", (), {"name": "iter_0000001"})
    monkeypatch.setattr(f"{command}._loaded", lambda *_: (_plain(), None))
    monkeypatch.setattr(
        "ultramem_megatron.megatron.checkpoint.folder.loaded_iteration", lambda *_: found
    )
    monkeypatch.setattr(
        "ultramem_megatron.tools.export.hf_tokenizer.tokenizer_of", lambda _: HFTokenizer()
    )
    monkeypatch.setattr("ultramem_megatron.tools.export.model_card.model_card", lambda *_: "card")
    main(f"--load a --to hf {tmp_path}/out --max-shard-size 10KB".split())
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UltraMemError, match=r"holds kept\.txt already\. Choose another folder"):
        save_hf(_plain(), tmp_path, HFTokenizer(), "card")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    with pytest.raises(UltraMemError, match=r"kept\.txt is no folder"):
        save_hf(_plain(), tmp_path / "kept.txt", HFTokenizer(), "card")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda b: b[:-9], r"model\.safetensors is not as SHA256SUMS says"),
        ("config.json", lambda b: b[:40], r"config\.json cannot be read"),
        ("config.json", lambda b: b"[]", r"its model_type is None, not 'ultramem'"),
        ("config.json", lambda b: b.replace(b'"ultramem"', b'"llama"'), r"model_type is 'llama'"),
        ("config.json", lambda b: b.replace(b'"pooled"', b'"new"'), r"memory\.values is 'new'"),
        (
            "config.json",
            lambda b: b.replace(b'"layer_pattern": null', b'"layer_pattern": "*G"'),
            r"layer_pattern is 'G'; this model knows \*, -, E, M",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"layer_pattern": null', b'"layer_pattern": "*-*"'),
            r"layer_pattern \*-\* has not 2 layers",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"spans": "1:2"', b'"spans": "1:9"'),
            r"config\.json does not describe a model: .*leaves the model",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"num_keys": 8', b'"num_keys": 9'),
            r"do not fit config\.json: .*keys\.weight has shape",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'),
            r"do not fit config\.json: model\.layers\.2\..* is missing",
        ),
    ],
)
def test_damaged_folders_are_refused_by_name(tmp_path, file, change, message):
    save_hf(_plain(), tmp_path / "out", HFTokenizer(), "card")
    path = tmp_path / "out" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UltraMemError, match=message):
        load_hf(tmp_path / "out")


_NO_MODEL: dict[str, list[object]] = {
    "hidden_size": [None, -1, 0, 2**70, 1.5, "8", True],
    "num_hidden_layers": [2**31, "2", []],
    "num_experts": [-1, 10**13, 1.5],
    "head_dim": [-1, "x"],
    "dtype": [-1, [], "x", "Tensor"],
    "num_key_value_heads": [-1, 3],
    "layer_pattern": [[], {}, 7],
    "memory.num_keys": [None, 10**13, "8"],
    "memory.value_expansion": [None, float("nan"), "4"],
    "memory.share_order": [[], {}],
    "memory.share_values": [0, None],
    "memory.query_conv_kernel": [10**13, None],
    "memory.aux_loss_margin": ["x", None],
    "rope_parameters.rope_theta": [0],
}


@pytest.mark.parametrize("opens", [load_hf, open_folder])
def test_settings_of_other_kinds_and_sizes_are_refused(tmp_path, opens):
    save_hf(_plain(), tmp_path / "out", HFTokenizer(), "card")
    file = tmp_path / "out/config.json"
    written = file.read_text()
    for name, value in ((name, value) for name, values in _NO_MODEL.items() for value in values):
        content = json.loads(written)
        *parts, last = name.split(".")
        functools.reduce(dict.__getitem__, parts, content)[last] = value
        file.write_text(json.dumps(content))
        with pytest.raises(UltraMemError, match=r"config\.json does not describe a model") as error:
            opens(tmp_path / "out")
        assert "\n" not in str(error.value), (name, value)


def test_what_else_is_damaged_in_a_folder_is_named(tmp_path):
    save_hf(_plain(), tmp_path / "out", HFTokenizer(), "card")
    (tmp_path / "out/SHA256SUMS").write_bytes(b"\xff\xfe")
    (tmp_path / "out/generation_config.json").write_text("[")
    with pytest.raises(UltraMemError, match=r"generation_config\.json cannot be read"):
        open_folder(tmp_path / "out")
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 50', '"vocab_size": 60'))
    with pytest.raises(UltraMemError, match=r"do not fit config\.json: .* has shape \(50, 16\)"):
        open_folder(tmp_path / "out")
    (tmp_path / "out/model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(UltraMemError, match=r"index\.json cannot be read"):
        load_hf(tmp_path / "out")


@contextlib.contextmanager
def _files_of_at_most(size):
    """As on a disk without room: larger ones cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_cannot_be_written_whole_is_named(tmp_path):
    plain = _plain()
    save_hf(plain, tmp_path / "hf", HFTokenizer(), "card")
    size = (tmp_path / "hf/model.safetensors").stat().st_size // 2
    writes = {
        "again": lambda out: save_hf(plain, out, HFTokenizer(), "card"),
        "plain": lambda out: save_plain(plain, out),
        "int8": lambda out: quantize(tmp_path / "hf", out, "int8", None),
        "edited": lambda out: write_edited(tmp_path / "hf", out, [Edit(1, 3, 0.0)]),
    }
    for name, write in writes.items():
        message = f"{name} could not be written: .*too large.* not whole"
        with _files_of_at_most(size), pytest.raises(UltraMemError, match=message):
            write(tmp_path / name)


def test_weights_without_sums_that_are_damaged_or_lie_elsewhere_are_refused(tmp_path):
    save_hf(_plain(), tmp_path / "out", HFTokenizer(), "card")
    (tmp_path / "out/SHA256SUMS").unlink()
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UltraMemError, match=r"model\.safetensors cannot be read"):
        load_hf(tmp_path / "out")
    index = tmp_path / "out/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(UltraMemError, match=r"'\.\./model\.safetensors', which is not in its"):
        load_hf(tmp_path / "out")


def test_code_in_a_folder_is_not_run_on_the_way_back(tmp_path):
    save_hf(_plain(), tmp_path / "out", HFTokenizer(), "card")
    for path in (tmp_path / "out").glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_hf(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_kind_that_the_model_file_lacks_is_refused_by_its_flag():
    plain = _plain()
    odd = dataclasses.replace(plain.config.ultramem, retrieval="nearest")
    config = dataclasses.replace(plain.config, ultramem=odd)
    with pytest.raises(UltraMemError, match=r"--ultramem-retrieval nearest cannot be exported for"):
        hf_config(config)


def test_caches_in_pages_are_refused_with_a_convolution():
    plain = _plain()
    memory = dataclasses.replace(plain.config.ultramem, query_conv_kernel=3)
    config = hf_config(dataclasses.replace(plain.config, ultramem=memory))
    model = UltraMemGPTForCausalLM(config)
    with pytest.raises(ValueError, match=r"query_conv_kernel is 3: caches in pages"):
        model(torch.zeros(1, 3, dtype=torch.int64), read_index=[])
    with pytest.raises(ValueError, match=r"query_conv_kernel is 3: caches of a fixed size"):
        model.generate(torch.tensor([[3, 1]]), cache_implementation="static", max_new_tokens=2)
    model.config._attn_implementation = "sglang"
    with pytest.raises(ValueError, match="SGLang"):
        model(torch.zeros(1, 3, dtype=torch.int64))


@pytest.fixture
def mamba():
    sizes = {"num_heads": 4, "head_dim": 8, "num_groups": 2, "state_dim": 4}
    changes = {f"mamba_{name}": size for name, size in sizes.items()}
    plain = _plain()
    config = dataclasses.replace(plain.config, pattern="M*", ultramem=None, **changes)
    return UltraMemGPTForCausalLM(hf_config(config)).eval()


def test_what_a_state_of_mamba_cannot_follow_is_refused(mamba):
    with pytest.raises(ValueError, match=r"layer_pattern is M\*: caches in pages"):
        mamba(torch.zeros(1, 3, dtype=torch.int64), read_index=[])
    with pytest.raises(ValueError, match=r"layer_pattern is M\*: caches of a fixed size"):
        mamba.generate(torch.tensor([[3, 1]]), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"layer_pattern is M\*: .* know no ends of texts"):
        mamba(torch.zeros(1, 4, dtype=torch.int64), position_ids=torch.tensor([[0, 1, 0, 1]]))
    cache = mamba(torch.zeros(1, 3, dtype=torch.int64), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(-1)


def test_a_new_mamba_starts_as_its_authors_do(mamba):
    mixer = mamba.model.layers[0].mamba
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 <= step.min() < step.max() <= 1e-1
    assert 1 <= mixer.A_log.exp().min() < mixer.A_log.exp().max() <= 16
    assert mixer.conv1d_weight.abs().max() <= 0.5
    assert mixer.D.eq(1).all()
