"""Tables left in host memory or on disk: the logits of tables on the device, bit for bit."""

import os
import shutil
import sys
import time

import pytest
import torch

from tests.decoding import full_logits, random_model
from tests.ranks import RanksFailed, run_on_ranks
from tests.resident import forget, mapped, resident
from tests.training_runs import make_saving_fast, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.generate import parse
from ultramem_megatron.inference.layout import InferenceLayout
from ultramem_megatron.inference.layout_flags import layout_from
from ultramem_megatron.inference.table_memory import check_table_memory, describe_cache
from ultramem_megatron.megatron.checkpoint.table_files import TableFiles
from ultramem_megatron.memory.tables.mapped import pages_in_memory
from ultramem_megatron.memory.tables.value_table import value_tables

_KINDS = ("ultramem-conv", "ultramemv2", "moe-ultramem", "pkm", "hybrid")
_CUTS = {"number": (2, "number"), "dimension": (2, "dimension"), "whole": (1, "auto")}
_FEW = [("ultramem-conv", "number"), ("ultramemv2", "dimension")]
_ALL = [(kind, cut) for kind in _KINDS for cut in _CUTS]


def _save(folder, cases):
    """A checkpoint of each kind, as two ranks write it that cut its tables so."""
    from ultramem_megatron.megatron.checkpoint.weights import save_weights

    make_saving_fast()
    for kind, cut in cases:
        model, args = random_model(kind, InferenceLayout(2, *_CUTS[cut]))
        save_weights(model, args, folder / f"{kind}-{cut}")


def _logits(folder, *layout, shape=(3, 12)):
    from ultramem_megatron.inference.loading import load_for_inference

    tokens = torch.randint(500, shape, generator=torch.Generator().manual_seed(0))
    loaded = load_for_inference(str(folder), layout=InferenceLayout(*layout))
    return full_logits(loaded.model, tokens)


def _all_logits(folder, cases, ranks):
    return {
        (kind, cut): [
            _logits(folder / f"{kind}-{cut}", ranks, 1, "auto", where)
            for where in ("device", "host", "disk")
        ]
        for kind, cut in cases
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(2, _save, folder, _FEW)
    return folder


def test_logits_do_not_depend_on_where_tables_are(saved):
    for case, (device, host, disk) in run_on_ranks(1, _all_logits, saved, _FEW, 1)[0].items():
        assert torch.equal(host, device), case
        assert torch.equal(disk, device), case


def _cached_logits(folder, cases, ranks):
    """Of each case without a cache and with one, read twice; rows from caches, and of how many."""
    from ultramem_megatron.inference.loading import load_for_inference

    tokens, found = torch.randint(500, (3, 12), generator=torch.Generator().manual_seed(0)), {}
    for kind, cut in cases:
        case = folder / f"{kind}-{cut}"
        expected = _logits(case, ranks, 1, "auto", "device")
        for where in ("host", "disk"):
            layout = InferenceLayout(ranks, 1, table_memory=where, table_cache_rows=40)
            model = load_for_inference(str(case), layout=layout).model
            logits = [full_logits(model, tokens) for _ in range(2)]
            tables = [table.stored.hot for table in value_tables(model).values()]
            equal = all(torch.equal(found, expected) for found in logits)
            hits = [hot.hits for hot in tables]
            found[kind, cut, where] = equal, hits, [hot.reads for hot in tables]
    return found, describe_cache(model)


def test_logits_do_not_depend_on_a_cache_of_rows(saved):
    found, line = run_on_ranks(1, _cached_logits, saved, _FEW, 1)[0]
    for case, (equal, hits, reads) in found.items():
        assert equal, case
        assert all(0 < hit < read for hit, read in zip(hits, reads, strict=True)), case
    _, hits, reads = found["ultramemv2", "dimension", "disk"]
    assert len(hits) == 4  # of two memories each, values and pre-values
    assert f"{sum(hits):,} of {sum(reads):,} rows that steps read" in line


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cache_changes_nothing_of_any_kind(tmp_path, ranks):
    run_on_ranks(2, _save, tmp_path, _ALL)
    for found, _ in run_on_ranks(ranks, _cached_logits, tmp_path, _ALL, ranks):
        for case, (equal, hits, _) in found.items():
            assert equal, case
            assert all(hits), case


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_of_every_kind_on_one_rank_and_two(tmp_path, ranks):
    run_on_ranks(2, _save, tmp_path, _ALL)
    found = run_on_ranks(ranks, _all_logits, tmp_path, _ALL, ranks)
    for of_rank in found:
        for case, (device, host, disk) in of_rank.items():
            assert torch.equal(host, device), case
            assert torch.equal(disk, device), case


def _quantized_logits(folder, cases, ranks):
    """From 8 bits; from tables on the device, which are overwritten by what was decoded; bytes."""
    from ultramem_megatron.inference.loading import load_for_inference

    tokens, found = torch.randint(500, (3, 12), generator=torch.Generator().manual_seed(0)), {}
    for (kind, cut), (table_format, block) in cases.items():
        case = str(folder / f"{kind}-{cut}")
        layout = InferenceLayout(ranks, 1, "auto", "host", None, 0, table_format, block)
        coded = load_for_inference(case, layout=layout).model
        whole = load_for_inference(case, layout=InferenceLayout(ranks, 1)).model
        tables = value_tables(coded)
        for name, table in value_tables(whole).items():
            decoded = tables[name].stored.values.values()
            assert 0 < (decoded - table.weight).norm() / table.weight.norm() < 0.05, name
            table.weight.data.copy_(decoded)
        held = [(t.stored.values, t.layout.num_values) for t in tables.values()]
        rows = [sum(part.nbytes for part in values) / number for values, number in held]
        found[kind, cut] = full_logits(coded, tokens), full_logits(whole, tokens), rows
    return found


def test_tables_in_eight_bits_give_the_logits_of_what_was_decoded(saved):
    cases = dict(zip(_FEW, (("int8", None), ("fp8", 4)), strict=True))
    found = run_on_ranks(1, _quantized_logits, saved, cases, 1)[0]
    for case, (coded, whole, _) in found.items():
        assert torch.equal(coded, whole), case
    assert set(found[_FEW[0]][2]) == {16 + 4}  # bytes of a row
    assert 16 + 4 * 4 in found[_FEW[1]][2]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_eight_bits_of_every_kind_on_one_rank_and_two(tmp_path, ranks):
    run_on_ranks(2, _save, tmp_path, _ALL)
    for of_rank in run_on_ranks(
        ranks, _quantized_logits, tmp_path, dict.fromkeys(_ALL, ("fp8", 2)), ranks
    ):
        for case, (coded, whole, _) in of_rank.items():
            assert torch.equal(coded, whole), case


def _save_large(folder):
    """One table of 32 MB."""
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights

    flags = tiny_gpt(ultramem_spans="1:2", ultramem_num_keys=724, max_position_embeddings=32)
    model, args = untrained_model(flags)
    save_weights(model, args, folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_of_a_table_on_disk_only_pages_with_rows_that_are_read_come_into_memory(tmp_path):
    run_on_ranks(1, _save_large, tmp_path)
    (file,) = (tmp_path / "release").glob("*.distcp")
    forget(file)
    key, rows = "decoder.layers.0.memory.values.weight", torch.arange(0, 724**2, 20_000)
    table = TableFiles(str(file.parent), readahead=False).table(key, 0, 724**2)
    assert table.fetch(rows, 16).std() > 0
    pages = os.sysconf("SC_PAGESIZE") * len(rows)
    assert 0 < resident(file) <= 2 * pages  # a row may lie on two


def _pages_beside_layers(folder):
    """Pages of the table in memory: before a forward, in its span's last layer, and after it."""
    from ultramem_megatron.inference.loading import load_for_inference

    model = load_for_inference(str(folder), layout=InferenceLayout(table_memory="disk")).model
    (table,) = value_tables(model).values()
    forget(next((folder / "release").glob("*.distcp")))  # loading checks its sums
    (piece,) = table._reader.table.pieces
    seen = [pages_in_memory(piece.content)[0]]

    def wait(*_):
        end = time.monotonic() + 20
        while pages_in_memory(piece.content)[0] == seen[0] and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        seen.append(pages_in_memory(piece.content)[0])

    model.decoder.layers[1].self_attention.register_forward_hook(wait)
    full_logits(model, torch.tensor([[1, 2, 3]]))
    return [*seen, pages_in_memory(piece.content)[0]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise and mincore are Linux's")
def test_rows_come_while_the_layers_of_a_span_compute(tmp_path):
    run_on_ranks(1, _save_large, tmp_path)
    before, beside, after = run_on_ranks(1, _pages_beside_layers, tmp_path)[0]
    assert before < beside == after


def _shares(folder):
    """Of a table of 32 MB that each rank reads whole: bytes in memory here, and this rank's share.

    By where it is; one memory that several map is shared among them (Pss in proc(5)).
    """
    import torch.distributed as dist

    from ultramem_megatron.inference.loading import load_for_inference

    found = []
    for where, name in (("host", "memfd:ultramem_table"), ("disk", ".distcp")):
        model = load_for_inference(str(folder), layout=InferenceLayout(2, 1, "auto", where)).model
        (table,) = value_tables(model).values()
        assert table._reader.table.fetch(torch.arange(724**2), 16).std() > 0
        dist.barrier()
        found.append((mapped(name, "Rss"), mapped(name, "Pss")))
        dist.barrier()
        del model, table
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_ranks_of_a_host_share_one_copy(tmp_path):
    run_on_ranks(1, _save_large, tmp_path)
    table = 724**2 * 16 * 4  # bytes
    for of_rank in run_on_ranks(2, _shares, tmp_path):
        for resident_bytes, share in of_rank:
            assert resident_bytes >= table
            assert share <= resident_bytes * 0.51


def _damaged(folder):
    """What reading a table says of a shard that is not what the metadata says."""
    key, rows = "decoder.layers.0.memory.values.weight", 12 * 12
    messages = []
    for hurt in (_cut_short, _asks_for_code):
        files = TableFiles(str(folder / "release"), readahead=False)
        hurt(folder / "release", files, key)
        with pytest.raises(UltraMemError) as raised:
            files.table(key, 0, rows)
        messages.append(str(raised.value))
    with pytest.raises(UltraMemError) as raised:
        files.table(key.replace("0", "7"), 0, rows)
    return [*messages, str(raised.value)]


def _cut_short(_folder, files, key):
    stored = files._metadata.state_dict_metadata[key]
    stored.chunks.pop()
    files._metadata.storage_data = {
        index: place
        for index, place in files._metadata.storage_data.items()
        if index.fqn != key or index.offset[0] == 0
    }


class _Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _asks_for_code(folder, files, key):
    for index, place in files._metadata.storage_data.items():
        if index.fqn == key:
            torch.save(_Code(), folder / "other.distcp")
            length = (folder / "other.distcp").stat().st_size
            files._metadata.storage_data[index] = type(place)("other.distcp", 0, length)


def test_a_shard_that_is_no_table_is_refused_and_nothing_of_it_run(saved, monkeypatch, tmp_path):
    copy = shutil.copytree(saved / "ultramem-conv-number", tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    short, code, missing = run_on_ranks(1, _damaged, copy)[0]
    assert "of 144 x 16 numbers of decoder.layers.0.memory.values.weight its files hold" in short
    assert "asks for posix.mkdir" in code or "asks for os.mkdir" in code
    assert "has no table decoder.layers.7.memory.values.weight" in missing
    assert not list((tmp_path / "empty").iterdir())


def test_what_needs_tables_on_the_device_is_refused(saved):
    with pytest.raises(UltraMemError, match="--table-memory disk, --cuda-graphs: the host fetches"):
        check_table_memory("disk", True, False)
    with pytest.raises(UltraMemError, match="--table-memory host, --premultiply-values: it mult"):
        check_table_memory("host", False, True)
    folder = saved / "ultramem-conv-number"
    with pytest.raises(RanksFailed, match="Leave --ultramem-parallel-size 2 out"):
        run_on_ranks(1, _logits, folder, 1, 2, "auto", "disk")
    with pytest.raises(RanksFailed, match="--table-block is 3; values are 16 wide"):
        run_on_ranks(1, _logits, folder, 1, 1, "auto", "host", None, 0, "int8", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table-cache-rows", "9"], "--table-cache-rows 9: tables are on the device already"),
        (
            ["--table-cache-rows", "0", "--table-memory", "disk"],
            "--table-cache-rows is 0; it must be a whole number >= 1",
        ),
        (["--table-format", "fp8"], "--table-format fp8: of tables in the host's memory alone"),
        (["--table-block", "4"], "--table-block 4: there are no scales. Give --table-format"),
    ],
)
def test_wrong_caches_and_formats_are_refused(words, message):
    with pytest.raises(UltraMemError, match=message):
        layout_from(parse(["--load", "x", *words]))
