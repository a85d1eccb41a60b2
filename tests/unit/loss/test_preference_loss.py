"""DPO and its variants: as a plain computation of each pair says, and as TRL does."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import tiny
from tests.foreign import args_of, random_weights, write_hf
from tests.unit.loss.test_loss import problem
from tests.unit.loss.test_regularised_loss import LargestAtOnce
from torchtitan.config.errors import ConfigError
from torchtitan.config.schema import Loss
from torchtitan.loss.preference import DPOLoss
from torchtitan.loss.registry import DPOSettings, loss_settings
from torchtitan.loss.token_log_probs import token_log_probs
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.models.registry import get_family

VARIANTS: list[dict[str, Any]] = [
    {"beta": 0.3},
    {"beta": 0.3, "label_smoothing": 0.2},
    {"beta": 0.3, "variant": "robust", "label_smoothing": 0.2},
    {"beta": 0.3, "variant": "ipo"},
    {"beta": 2.0, "variant": "simpo", "margin": 0.7},
]


@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_log_probs_and_their_gradients(chunk, dtype, tolerance):
    hidden, head, batch = problem(dtype)
    labels, factors = batch["labels"].flatten(), torch.randn(21, dtype=torch.float64)

    def results(hidden: Tensor, weight: Tensor, of) -> list[Tensor]:
        found = of(hidden.flatten(0, 1), weight)
        grads = torch.autograd.grad(found, [hidden, weight], factors.to(found.dtype))
        return [found.detach(), *grads]

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = (hidden @ weight.t()).log_softmax(-1)
        found = log_probs.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
        return found.masked_fill(labels == IGNORE_INDEX, 0)

    ours = results(hidden, head.weight, lambda h, w: token_log_probs(h, w, labels, chunk))
    wide = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    theirs = results(*wide, plain)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() / their.abs().max() < tolerance


def test_logits_exist_one_chunk_at_a_time():
    """Twice a chunk's: those in a product, and their exponentials."""
    hidden = torch.randn(1024, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    labels = torch.randint(1000, (1024,))
    with LargestAtOnce() as largest:
        token_log_probs(hidden, weight, labels, 64).sum().backward()
    assert largest.bytes < 2.5 * 64 * 1000 * 4 < 1024 * 1000 * 4 / 5


ARGS = args_of(n_heads=4, n_kv_heads=2, head_dim=8)


def model_of(weights: dict[str, Tensor]) -> nn.Module:
    model = get_family("llama3").build(ARGS)
    model.load_state_dict(weights)
    return model


def weights_of(scale: float) -> dict[str, Tensor]:
    return {
        name: weight * (scale if weight.dim() == 2 else 1)
        for name, weight in random_weights(ARGS).items()
    }


def ours_of(
    settings: dict[str, Any], policy: nn.Module, reference: nn.Module, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """The mean over the pairs, and the terms."""
    loss = DPOLoss(DPOSettings(**settings), num_chunks=3)
    inputs = [batch[name] for name in ("tokens", "positions", "document_ids")]
    if frozen_pass := loss.frozen_pass():
        with torch.no_grad():
            assert frozen_pass.sum(reference(*inputs), reference.head, batch) == 0
        [batch] = frozen_pass.annotated([batch])
    count = loss.count(batch)
    total = loss.sum(policy(*inputs), policy.head, batch)
    terms = {name: float(value / count) for name, value in loss.take_terms().items()}
    return total / count, terms


def answers_of(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document with targets: chosen, rejected, chosen, ..."""
    found = []
    for row in range(len(batch["tokens"])):
        for number in range(int(batch["document_ids"][row].max()) + 1):
            here = batch["document_ids"][row] == number
            labels = batch["labels"][row][here]
            if (labels != IGNORE_INDEX).any():
                found.append((batch["tokens"][row][here], labels))
    return found


def plain_of(
    policy: nn.Module, reference: nn.Module, batch: Batch, beta: float, **settings: Any
) -> Tensor:
    """One document at a time, by the papers' formulas."""
    smoothing, margin = settings.get("label_smoothing", 0.0), settings.get("margin", 0.0)
    scores = []
    for tokens, labels in answers_of(batch):
        positions, targets = torch.arange(len(tokens)).unsqueeze(0), labels != IGNORE_INDEX
        logps = [
            model.head(model(tokens.unsqueeze(0), positions))[0]
            .log_softmax(-1)[targets, labels[targets]]
            .sum()
            for model in (policy, reference)
        ]
        length = int(targets.sum())
        ratio = logps[0] - logps[1].detach()
        score = {"ipo": ratio / length, "simpo": logps[0] / length}
        scores.append(score.get(settings.get("variant", "sigmoid"), ratio))
    losses = []
    for chosen, rejected in zip(scores[::2], scores[1::2], strict=True):
        x = chosen - rejected
        if settings.get("variant") == "ipo":
            losses.append((x - 1 / (2 * beta)) ** 2)
            continue
        right, wrong = (torch.log(1 + torch.exp(s * (margin - beta * x))) for s in (1, -1))
        if settings.get("variant") == "robust":
            losses.append(((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing))
        else:
            losses.append((1 - smoothing) * right + smoothing * wrong)
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """One to train and its reference, of other weights."""
    return model_of(weights_of(0.25)).double(), model_of(weights_of(0.2)).double()


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_variants(settings, models):
    """Packed rows with prompts, several pairs and padding."""
    policy, reference = models
    parameters = list(policy.parameters())
    ours, terms = ours_of(settings, policy, reference, tiny.pairs())
    theirs = plain_of(policy, reference, tiny.pairs(), **settings)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    grads = (torch.autograd.grad(loss, parameters) for loss in (ours, theirs))
    for our, their in zip(*grads, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)
    assert terms["rewards/margins"] == pytest.approx(
        terms["rewards/chosen"] - terms["rewards/rejected"]
    )


@pytest.mark.parametrize("settings", [row for row in VARIANTS if "margin" not in row], ids=str)
def test_the_start_equals_its_reference(settings, models):
    policy, _ = models
    loss, terms = ours_of(settings, policy, policy, tiny.pairs())
    start = {"ipo": (1 / 0.6) ** 2}.get(settings.get("variant", ""), math.log(2))
    assert loss.item() == start and set(terms.values()) == {0}


def test_what_counts_is_pairs():
    batch = tiny.pairs()
    loss = DPOLoss(DPOSettings())
    assert loss.count(batch) == len(answers_of(batch)) // 2 > len(batch["tokens"])
    last = batch["document_ids"][3] == 1
    batch["labels"][3][last] = IGNORE_INDEX
    with_half_a_pair = loss.count(batch)
    assert with_half_a_pair == len(answers_of(batch)) // 2


def test_half_a_pair_adds_nothing(models):
    policy, reference = models
    batch = tiny.pairs()
    batch["labels"][0][batch["document_ids"][0] == 1] = IGNORE_INDEX
    without = Batch({name: tensor[1:] for name, tensor in batch.items()})
    ours, _ = ours_of({}, policy, reference, batch)
    theirs, _ = ours_of({}, policy, reference, without)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def padded(answers: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """TRL's batch: all chosen, then all rejected, each in a row of its own."""
    rows = [*answers[::2], *answers[1::2]]
    shape = (len(rows), max(len(tokens) for tokens, _ in rows))
    ids, is_text, is_answer = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, (tokens, labels) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        is_text[row, : len(tokens)] = 1
        is_answer[row, 1 : len(tokens)] = (labels[:-1] != IGNORE_INDEX).long()
    return {"input_ids": ids, "attention_mask": is_text, "completion_mask": is_answer}


class TRL:
    """TRL's own losses, of models in transformers, on a batch of its shape."""

    def __init__(self, tmp_path: Path, batch: Batch):
        transformers = pytest.importorskip("transformers")
        dpo = pytest.importorskip("trl.trainer.dpo_trainer")
        self._dpo = dpo.DPOTrainer
        self._inputs = padded(answers_of(batch))
        self.models = []
        for scale in (0.25, 0.2):
            write_hf(tmp_path / f"{scale}", weights_of(scale), ARGS)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / f"{scale}", dtype=torch.float32
            )
            outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
            dpo.add_fused_lm_head(model, outputs=outputs)
            self.models.append(model)

    def loss(self, kind: str, beta: float, label_smoothing: float) -> tuple[Tensor, dict[str, Any]]:
        metrics: dict[str, Any] = {"train": _Lists()}
        accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
        )
        trainer = SimpleNamespace(
            model=self.models[0].train(),
            ref_model=self.models[1],
            accelerator=accelerator,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            aux_loss_enabled=False,
            precompute_ref_logps=False,
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            loss_types=[kind],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            _metrics=metrics,
            _total_train_tokens=0,
            _tp_size=1,
        )
        loss = self._dpo._compute_loss(trainer, self.models[0], self._inputs, False)
        return loss, metrics["train"]

    def log_probs(self, average: bool) -> list[Tensor]:
        """Log-probabilities of the chosen and the rejected answers, by both models."""
        ids, mask = self._inputs["input_ids"], self._inputs["completion_mask"][:, 1:]
        found = []
        for model in self.models:
            logits = model(ids, attention_mask=self._inputs["attention_mask"]).logits[:, :-1]
            each = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1) * mask
            found.append(each.sum(-1) / (mask.sum(-1) if average else 1))
        return found


class _Lists(dict):
    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


@pytest.mark.parametrize("settings", VARIANTS[:1] + VARIANTS[2:4], ids=str)
def test_equals_trl(settings, tmp_path):
    batch = tiny.pairs()
    trl = TRL(tmp_path, batch)
    kind = settings.get("variant", "sigmoid")
    theirs, metrics = trl.loss(kind, settings["beta"], settings.get("label_smoothing", 0.0))
    ours, terms = ours_of(settings, model_of(weights_of(0.25)), model_of(weights_of(0.2)), batch)
    assert abs(ours.item() / theirs.item() - 1) < 1e-5
    for name, value in terms.items():
        assert value == pytest.approx(metrics[name][0], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("settings", [VARIANTS[1], VARIANTS[4]], ids=str)
def test_equals_trls_cpo(settings, tmp_path):
    """SimPO; and smoothed labels, with the ratios to the reference in place of log-probs."""
    with contextlib.suppress(ImportError):
        from trl.experimental.utils import logger  # noqa: F401 (warns that it is experimental)
    cpo = pytest.importorskip("trl.experimental.cpo")
    batch = tiny.pairs()
    is_simpo = settings.get("variant") == "simpo"
    with torch.no_grad():
        own, reference = TRL(tmp_path, batch).log_probs(average=is_simpo)
    scores = own if is_simpo else own - reference
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=settings["beta"],
        simpo_gamma=settings.get("margin", 0.0),
        label_smoothing=settings.get("label_smoothing", 0.0),
        loss_type="simpo" if is_simpo else "sigmoid",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    theirs, *rewards = cpo.CPOTrainer.cpo_loss(trainer, *scores.chunk(2))
    ours, terms = ours_of(settings, model_of(weights_of(0.25)), model_of(weights_of(0.2)), batch)
    assert abs(ours.item() / theirs.mean().item() - 1) < 1e-5
    found = [terms["rewards/chosen"], terms["rewards/rejected"]]
    assert found == pytest.approx([float(reward.mean()) for reward in rewards], rel=1e-4)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"beta": 0.0}, "loss.args.beta = 0.0"),
        ({"label_smoothing": 0.5}, "loss.args.label_smoothing = 0.5"),
        ({"variant": "kto"}, 'loss.args.variant = "kto"'),
        ({"variant": "ipo", "label_smoothing": 0.1}, 'is not used by the variant "ipo"'),
        ({"margin": 0.5}, 'is not used by the variant "sigmoid"'),
        ({"variant": "simpo", "reference_path": "x"}, 'is not used by the variant "simpo"'),
        ({"variant": "simpo", "reference_cache": "x"}, 'is not used by the variant "simpo"'),
        ({"reference": "base", "reference_path": "x"}, 'is not used by reference = "base"'),
    ],
)
def test_settings_that_do_not_fit(args, words):
    with pytest.raises(ConfigError) as error:
        loss_settings(Loss(name="dpo", args=args))
    assert words in str(error.value)


def test_only_simpo_needs_no_reference():
    assert DPOLoss(DPOSettings(variant="simpo")).frozen_pass() is None
    assert DPOLoss(DPOSettings()).frozen_pass() is not None
