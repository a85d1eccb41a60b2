"""Weights of other programs: each format gives back the model's, and each flaw is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.foreign import (
    INDEX,
    args_of,
    random_weights,
    write_gguf,
    write_hf,
    write_index,
    write_meta,
)
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.registry import get_family
from torchtitan.weights import source
from torchtitan.weights.description import describe_model
from torchtitan.weights.recognise import InvalidWeights, kind_of
from torchtitan.weights.source import WeightSource, open_weights

LLAMA = get_family("llama3")


def load(
    path: Path, args: DecoderArgs, family: ModelFamily = LLAMA, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All tensors of the model, filled."""
    with torch.device("meta"):
        model = family.build(args)
    tensors = {n: torch.full(p.shape, 7.0, dtype=dtype) for n, p in model.named_parameters()}
    opened = open_weights(path, family, args)
    assert set(opened.tensors) == set(tensors)
    opened.load(tensors)
    return tensors


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name].to(found[name].dtype)), name


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize("num_shards", [1, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_hugging_face_folder(tmp_path: Path, name: str, num_shards: int, tied: bool) -> None:
    args = args_of(name, tied_embeddings=tied)
    weights = random_weights(args, name)
    write_hf(tmp_path, weights, args, name, num_shards)
    assert kind_of(tmp_path) == "hf"
    assert_equal(load(tmp_path, args, get_family(name)), weights)


@pytest.mark.parametrize(("parts", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_meta_files(tmp_path: Path, parts: int, embedding_dim: int) -> None:
    args = args_of(n_heads=8, n_kv_heads=4, vocab_size=132)
    weights = random_weights(args)
    write_meta(tmp_path, weights, parts, embedding_dim)
    assert kind_of(tmp_path) == "meta"
    assert_equal(load(tmp_path, args), weights)
    opened = open_weights(tmp_path, LLAMA, args)
    box = opened.read("layers.1.attention.wo.weight", (3, 20), (5, 9))  # across two parts
    assert torch.equal(box, weights["layers.1.attention.wo.weight"][3:8, 20:29])


@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_file(tmp_path: Path, quantised: str) -> None:
    pytest.importorskip("gguf")
    args = args_of(n_heads=8, n_kv_heads=4, head_dim=4, ffn_dim=96, tied_embeddings=True)
    held = write_gguf(tmp_path / "any.gguf", random_weights(args), quantised)
    for path in (tmp_path, tmp_path / "any.gguf"):
        assert kind_of(path) == "gguf"
        assert_equal(load(path, args), held)


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary takes seconds; a file that has changed is read anew."""
    gguf = pytest.importorskip("gguf")
    parsed: list[Path] = []

    class Counting(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def __init__(self, path: Path):
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    args = args_of(n_heads=8, n_kv_heads=4, head_dim=4, ffn_dim=96)
    for number in (1, 2):
        write_gguf(tmp_path / "a.gguf", random_weights(args), ["F16", "F32"][number - 1], args=args)
        describe_model(tmp_path)
        open_weights(tmp_path, LLAMA, args)
        assert len(parsed) == number


def test_pieces_are_small_and_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes of pieces, what is read is the same; a copy, not the mapped file."""
    args = args_of()
    weights = random_weights(args)
    write_hf(tmp_path, weights, args, num_shards=2)
    monkeypatch.setattr(source, "PIECE_BYTES", 700)
    monkeypatch.setattr(source, "_MAPPED_BYTES", 1500)
    asked: list[int] = []
    get = source._OpenFiles.get

    def watched(self: Any, file: Path, num_bytes: int) -> Any:
        asked.append(num_bytes)
        assert len(self._open) <= 2
        return get(self, file, num_bytes)

    monkeypatch.setattr(source._OpenFiles, "get", watched)
    assert_equal(load(tmp_path, args, dtype=torch.float64), weights)
    # A piece, or the heads that it touches.
    assert max(asked) <= 700 + 2 * 6 * 32 * 4
    before = open_weights(tmp_path, LLAMA, args).read("norm.weight", (2,), (3,))
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(before, weights["norm.weight"][2:5])


def test_padding_is_zeros(tmp_path: Path) -> None:
    args = args_of()
    weights = random_weights(args)
    write_hf(tmp_path, weights, args)
    padded = args_of(vocab_size=140)
    assert open_weights(tmp_path, LLAMA, padded).tensors["output.weight"]["shape"] == [131, 32]
    opened = open_weights(tmp_path, LLAMA, padded, pads_vocabulary=True)
    assert opened.tensors["output.weight"]["shape"] == [140, 32]
    rows = opened.read("output.weight", (129, 0), (11, 32))
    assert torch.equal(rows[:2], weights["output.weight"][129:]) and not rows[2:].any()


# --- a real model ---------------------------------------------------------------------------------


SMOLLM2 = {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "ffn_dim": 1536}
SMOLLM2 |= {"vocab_size": 49152, "rope_theta": 1e5, "tied_embeddings": True}


def logits(path: Path, family: ModelFamily, tokens: Tensor) -> Tensor:
    args = family.resolve_args("debugmodel", SMOLLM2)
    with torch.device("meta"):
        model = family.build(args)
    model.to_empty(device="cpu")
    open_weights(path, family, args).load(dict(model.named_parameters()))
    with torch.no_grad():
        return model.head(model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0)))


def mutated(*changes: tuple[str, dict[str, Any]]) -> ModelFamily:
    """Llama with other rows in its table."""
    by_end = dict(changes)
    rows = [
        replace(row, **by_end.get(row.ours.removeprefix("layers.{n}."), {}))
        for row in LLAMA.hf_weights
    ]
    return replace(LLAMA, hf_weights=tuple(rows))


def test_smollm2_answers_as_in_transformers(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, 40000, (1, 24), generator=generator)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (logits(smollm2, LLAMA, tokens) - expected).abs().max() < 2e-4
    their_up = "model.layers.{n}.mlp.up_proj.weight"
    their_gate = "model.layers.{n}.mlp.gate_proj.weight"
    for family in (
        mutated(("attention.wq.weight", {"rope": False})),
        mutated(("attention.wk.weight", {"rope": False})),
        mutated(
            ("feed_forward.w1.weight", {"theirs": their_up}),
            ("feed_forward.w3.weight", {"theirs": their_gate}),
        ),
    ):
        assert (logits(smollm2, family, tokens) - expected).abs().max() > 1.0


def test_smollm2_in_gguf_is_the_folder(smollm2: Path, smollm2_gguf: Path) -> None:
    """Its matrices are in 4 and 8 bits."""
    args = LLAMA.resolve_args("debugmodel", SMOLLM2)
    one, other = (open_weights(path, LLAMA, args) for path in (smollm2, smollm2_gguf))
    assert one.tensors == other.tensors
    for name, entry in one.tensors.items():
        offsets = [size // 3 for size in entry["shape"]]
        box = (name, offsets, [min(50, size // 2) for size in entry["shape"]])
        assert torch.equal(one.read(*box), other.read(*box)), name


# --- flaws ----------------------------------------------------------------------------------------

ARGS = args_of()
SHARD = "model-00002-of-00003.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def index_of(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map


def change_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weight_map = index_of(folder)
        change(weight_map)
        write_index(folder, weight_map)

    return apply


def change_shard(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Change what a shard holds, and list that in the index."""

    def apply(folder: Path) -> None:
        before = load_file(folder / SHARD)
        weights = dict(before)
        change(weights)
        save_file(weights, folder / SHARD)
        weight_map = {k: v for k, v in index_of(folder).items() if k not in before}
        write_index(folder, weight_map | dict.fromkeys(weights, SHARD))

    return apply


def cut_off(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-10])


def name_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    entry = f'"{Q_PROJ}": "{index_of(folder)[Q_PROJ]}"'
    assert entry in text
    (folder / INDEX).write_text(text.replace(entry, f"{entry}, {entry}"))


def link_file(folder: Path) -> None:
    """Another name of a file, for one of its tensors."""
    (folder / "other.safetensors").symlink_to(folder / SHARD)
    name = next(name for name, file in index_of(folder).items() if file == SHARD)
    change_index(lambda of: of.update({name: "other.safetensors"}))(folder)


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(values)) and None


FLAWS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: is missing"),
    "cut off": (cut_off, f"{SHARD}: cannot be read: .*not fully covered"),
    "no header": (lambda folder: (folder / SHARD).write_bytes(b"{}"), f"{SHARD}: cannot be read"),
    "leaves": (change_index(lambda of: of.update({Q_PROJ: "../x.safetensors"})), "'../x.safeten"),
    "absolute": (change_index(lambda of: of.update({Q_PROJ: "/etc/passwd"})), "not a file of this"),
    "tensor twice": (name_twice, f"names {Q_PROJ} twice"),
    "file twice": (link_file, f"names .*{SHARD} twice"),
    "listed, not there": (change_index(lambda of: of.update({"x": SHARD})), "lacks x, which"),
    "there, not listed": (change_index(lambda of: of.pop(Q_PROJ)), f"holds {Q_PROJ}, which"),
    "no list": (change_index(lambda of: of.clear()), "has no weight_map"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "index.json: cannot be read"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "holds 3 safetensors files and no"),
    "both": (
        lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors"),
        "holds both model.safetensors and",
    ),
    "unknown": (
        change_shard(lambda held: held.update({f"{Q_PROJ[:-7]}.bias": torch.zeros(2)})),
        r"no counterpart of model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "8 bits": (
        change_shard(lambda held: held.update({k: v.to(torch.int8) for k, v in held.items()})),
        "is stored as I8: quantised",
    ),
    "a number": (
        change_shard(lambda held: held.update({k: torch.tensor(1.0) for k in held})),
        "is a single number",
    ),
    "quantised": (set_config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "config disagrees": (set_config(vocab_size=132), "vocab_size is 132, but .* has 131 rows"),
}


@pytest.mark.fault("F57")
@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_of_a_hugging_face_folder(tmp_path: Path, flaw: str) -> None:
    change, words = FLAWS[flaw]
    write_hf(tmp_path, random_weights(ARGS), ARGS, num_shards=3)
    open_weights(tmp_path, LLAMA, ARGS)
    change(tmp_path)
    with pytest.raises(InvalidWeights, match=words):
        open_weights(tmp_path, LLAMA, ARGS)


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    write_hf(tmp_path, weights, ARGS, num_shards=3)
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert_equal(load(tmp_path, ARGS), weights)


def test_a_head_of_its_own(tmp_path: Path) -> None:
    """Written twice it is tied; another matrix is lost if the config ties it, so it is refused."""
    tied = args_of(tied_embeddings=True)
    weights = random_weights(tied)
    head = weights["tok_embeddings.weight"].clone()
    write_hf(tmp_path / "twice", {**weights, "output.weight": head}, ARGS)
    assert_equal(load(tmp_path / "twice", tied), weights)
    write_hf(tmp_path / "own", random_weights(ARGS), ARGS)
    with pytest.raises(InvalidWeights, match=r"lm_head.weight differs .*tied_embeddings = false"):
        load(tmp_path / "own", tied)


def meta_flaw(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "consolidated.01.pth"
    held = torch.load(file)  # noqa: TID251
    change(held)
    torch.save(held, file)


class Canary:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


META_FLAWS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part": (lambda folder: (folder / "consolidated.00.pth").unlink(), "00.pth: is missing"),
    "cut off": (
        lambda folder: (folder / "consolidated.01.pth").write_bytes(
            (folder / "consolidated.01.pth").read_bytes()[:-100]
        ),
        "01.pth: cannot be read: PytorchStreamReader failed",
    ),
    "code": (
        lambda folder: torch.save({"a": Canary()}, folder / "consolidated.01.pth"),
        "01.pth: cannot be read: .*[Ww]eights",
    ),
    "lacks": (lambda folder: meta_flaw(folder, lambda held: held.pop("norm.weight")), "not in all"),
    "shapes": (
        lambda folder: meta_flaw(folder, lambda h: h.update({"norm.weight": torch.zeros(3)})),
        "the parts of norm.weight differ",
    ),
    "old format": (
        lambda folder: torch.save(
            {"norm.weight": torch.zeros(3)},
            folder / "consolidated.01.pth",
            _use_new_zipfile_serialization=False,
        ),
        "mmap can only be used with files saved with",
    ),
}


@pytest.mark.fault("F57")
@pytest.mark.parametrize("flaw", META_FLAWS)
def test_flaws_of_metas_files(tmp_path: Path, flaw: str, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = META_FLAWS[flaw]
    args = args_of(n_heads=8, n_kv_heads=4, vocab_size=132)
    write_meta(tmp_path, random_weights(args), 2)
    change(tmp_path)
    with pytest.raises(InvalidWeights, match=words):
        open_weights(tmp_path, LLAMA, args)
    assert "unpickled" not in capfd.readouterr().out


def test_flaws_of_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    args = args_of(n_heads=8, n_kv_heads=4)
    file, weights = tmp_path / "a.gguf", random_weights(args)
    write_gguf(file, weights, architecture="qwen2")
    with pytest.raises(InvalidWeights, match="architecture is 'qwen2'; only llama and qwen3"):
        open_weights(file, LLAMA, args)
    write_gguf(file, weights)
    with pytest.raises(InvalidWeights, match=r"no counterpart of blk\.1"):
        open_weights(file, LLAMA, args_of(n_heads=8, n_kv_heads=4, n_layers=1))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(InvalidWeights, match=r"a\.gguf: cannot be read"):
        open_weights(file, LLAMA, args)


def test_a_family_without_names(tmp_path: Path) -> None:
    write_hf(tmp_path, random_weights(ARGS), ARGS)
    with pytest.raises(InvalidWeights, match="declares no names"):
        open_weights(tmp_path, replace(LLAMA, hf_weights=()), ARGS)
    assert issubclass(type(open_weights(tmp_path, LLAMA, ARGS)), WeightSource)
