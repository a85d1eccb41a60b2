"""The handler `lora`: train low-rank adapters of linears, and freeze everything else.

LoRA (https://arxiv.org/abs/2106.09685) adds `scale * B A x` to a linear's output. A starts normal
and B at zero, so the first loss is the base model's. DoRA (https://arxiv.org/abs/2402.09353) also
trains the length of each row of the adapted matrix; its own length is a constant to the gradient.

The names of the base's parameters stay, so that weights without adapters load as they are.
Checkpoints leave the base out, and name it. Under tensor parallelism A and B are cut along the
dimension that they share with the matrix, and no further sequence is exchanged: where the matrix is
cut by rows, `B A x` is a term of the sum that is exchanged anyway.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.suggest import fix_of_glob
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.linears import linears_of
from torchtitan.handlers.peft import WEIGHTS_NAME, read_peft, read_peft_config, write_peft
from torchtitan.handlers.registry import handler_settings
from torchtitan.handlers.settings import LoraSettings
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family
from torchtitan.models.spec import InitRule, LanguageModel
from torchtitan.parallel.initialize import fill_part, local_indices
from torchtitan.parallel.tensor_parallel import ParallelStyle, TensorGroup
from torchtitan.parallel.token_dropout import TokenDropout
from torchtitan.utils.dtypes import at_least_float32, torch_dtype
from torchtitan.utils.torch_compat import local_tensor
from torchtitan.weights.recognise import InvalidWeights
from torchtitan.weights.stored_model import StoredModel

_C10D = torch.ops._c10d_functional

B_RULE = InitRule("constant", value=0.0)
"""The first values of `lora_b`."""


class LoraLinear(nn.Linear):
    """A frozen linear with an adapter: `W x + scale * B A dropout(x) + bias`.

    With a `magnitude` m, DoRA: `m / |W + scale * B A| * (W x + scale * B A dropout(x)) + bias`, by
    rows.
    """

    lora_a: Tensor
    """`[rank, in]`."""
    lora_b: Tensor
    """`[out, rank]`."""
    magnitude: Tensor | None
    """`[out]`; None for plain LoRA."""
    scale: float
    dropout: TokenDropout
    group: TensorGroup | None = None
    """The ranks that hold the shards of the matrix, with tensor parallelism."""
    adapted: bool = True
    """False computes without the adapter."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if not self.adapted:
            return self.frozen_product(input, self.bias)
        down = F.linear(self.dropout(input), self.lora_a).flatten(0, -2)
        # What is kept of dropout is not scaled by itself: one number scales the whole branch.
        kept = 1 - self.dropout.p if self.training else 1.0
        magnitude, bias = self.magnitude, self.bias
        out = self.frozen_product(input, bias if magnitude is None else None).flatten(0, -2)
        out = torch.addmm(out, down, self.lora_b.t(), alpha=self.scale / kept)
        if magnitude is not None:
            out = out * (magnitude / self._row_norms().to(magnitude.dtype))
            out = out if bias is None else out + bias
        return out.unflatten(0, input.shape[:-1])

    def frozen_product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Map `[..., in]` to `[..., out]` without the adapter."""
        return F.linear(input, self.weight, bias)

    def frozen_matrix(self) -> Tensor:
        """Return the matrix that the adapter is added to."""
        return self.weight

    def frozen_parameter(self) -> tuple[Tensor, Tensor]:
        """Return a parameter with the matrix's rows, and this rank's part of the matrix."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight, local_tensor(weight)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Return the lengths of the rows of `W + scale * B A`, `[out]`, without forming it."""
        weight = self.frozen_matrix()
        dtype = at_least_float32(weight.dtype)
        a, b = self.lora_a, self.lora_b.to(dtype)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()  # [out]
        cross = F.linear(weight, a).to(dtype)  # W A^T, [out, rank]
        gram = F.linear(a, a).to(dtype)  # A A^T, [rank, rank]
        if self.group is not None and weight.size(1) < self.in_features:
            # These are sums over inputs, of which a rank has some.
            parts = torch.cat([squares, cross.flatten(), gram.flatten()])
            whole = _C10D.wait_tensor(_C10D.all_reduce(parts, "sum", self.group.name))
            squares, flat, gram = whole.split([squares.numel(), cross.numel(), gram.numel()])
            cross, gram = flat.view_as(cross), gram.view(len(a), len(a))
        inner = 2 * self.scale * cross + self.scale**2 * (b @ gram)
        return (squares + (b * inner).sum(1)).sqrt()


class LoraHandler(ModelHandler):
    """Adds adapters to linears."""

    name = "lora"
    adds_adapters = True

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self.settings: LoraSettings = handler_settings(job_config, self.name)
        training = job_config.training
        kept = self.settings.base_dtype or training.mixed_precision_param
        dtypes = torch_dtype(training.dtype), torch_dtype(kept)
        # What computes in fewer bits rounds the base to them at each step anyway.
        self.base_dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
        if self.settings.base_dtype is not None:
            self.base_dtype = dtypes[1]
        chosen = self.settings
        self._scale = scale_of(chosen)
        self._family = get_family(job_config.model.name)
        if chosen.adapter is not None:
            self.start_files = (Path(chosen.adapter) / WEIGHTS_NAME,)
        self._adapted: dict[str, int] = {}
        """Inputs of each adapted linear, by all of its names."""

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Find patterns that match no linear, and a rank that does not fit."""
        return self._check_targets(model)

    def check_start(self, model: nn.Module) -> list[ConfigIssue]:
        """Find an adapter of PEFT's that cannot be the start."""
        return [] if self.settings.adapter is None else self._check_adapter(model)

    def _check_targets(self, model: nn.Module) -> list[ConfigIssue]:
        linears = dict(linears_of(model))
        problems = []
        for index, glob in enumerate(self.settings.targets):
            if not any(_matches(name, glob) for name in linears):
                problem, fix = "it matches no linear of the model", fix_of_glob(glob, linears)
                key = f"handlers.{self.name}.targets[{index}]"
                problems.append(ConfigIssue(key, problem, fix, value=glob))
        if problems:
            return problems
        rank, key = self.settings.rank, f"handlers.{self.name}.rank"
        for name, linear in self._targets(model):
            least = min(linear.in_features, linear.out_features)
            if rank > least:
                shape = f"{linear.out_features} x {linear.in_features}"
                problem = f"is more than the matrix {name}, {shape}, has"
                fix = f"set it to at most {least}, or leave {name} out of the targets"
                return [ConfigIssue(key, problem, fix, rank)]
        return []

    def _check_adapter(self, model: nn.Module) -> list[ConfigIssue]:
        """Compare PEFT's adapter with the settings and the targets."""
        chosen, path = self.settings, self.settings.adapter
        assert path is not None
        fix = "choose settings like the adapter's, or another adapter"

        def issue(key: str, problem: str, value: object) -> ConfigIssue:
            return ConfigIssue(f"handlers.{self.name}.{key}", problem, fix, value)

        try:
            config = read_peft_config(Path(path))
            adapters = read_peft(Path(path), self._family, _args_of(model))
        except InvalidWeights as error:
            return [issue("adapter", f"cannot be loaded: {error}", path)]
        theirs = {
            "rank": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
        }
        issues = [
            issue(key, f"is {value} in {path}", getattr(chosen, key))
            for key, value in theirs.items()
            if getattr(chosen, key) != value
        ]
        if issues:
            return issues
        rank, wanted = chosen.rank, {}
        for name, linear in self._targets(model):
            wanted[f"{name}.lora_a"] = [rank, linear.in_features]
            wanted[f"{name}.lora_b"] = [linear.out_features, rank]
            if chosen.dora:
                wanted[f"{name}.magnitude"] = [linear.out_features]
        for name in [*wanted, *adapters]:
            here, there = wanted.get(name), adapters.get(name)
            if there is None:
                return [issue("targets", f"{name} is not in {path}", list(chosen.targets))]
            if here is None:
                return [issue("targets", f"{name} is only in {path}", list(chosen.targets))]
            if here != list(there.shape):
                problem = f"is of another model: its {name} is {list(there.shape)}, not {here}"
                return [issue("adapter", problem, path)]
        return []

    def convert(self, model: nn.Module) -> None:
        """Freeze the model and add the adapters. Raises ConfigError for targets that do not fit."""
        if problems := self._check_targets(model):  # a step needs no adapter to start from
            raise ConfigError(problems)
        dtype = torch.get_default_dtype()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dtype == dtype:
                parameter.data = parameter.data.to(self.base_dtype)
        targets = {linear for _, linear in self._targets(model)}
        for linear in targets:
            self._adapt(linear)
        named = model.named_modules(remove_duplicate=False)
        self._adapted = {name: linear.in_features for name, linear in named if linear in targets}  # type: ignore[misc]

    def _adapt(self, linear: nn.Linear) -> None:
        chosen, rank = self.settings, self.settings.rank
        linear.__class__ = LoraLinear
        assert isinstance(linear, LoraLinear)
        linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        linear.lora_b = nn.Parameter(torch.empty(linear.out_features, rank))
        magnitude = nn.Parameter(torch.empty(linear.out_features)) if chosen.dora else None
        linear.register_parameter("magnitude", magnitude)
        linear.scale = self._scale
        linear.dropout = TokenDropout(chosen.dropout, linear.in_features)

    def init_rule(self, name: str) -> InitRule | None:
        """Return the rule of an adapter's parameter."""
        linear, _, key = name.rpartition(".")
        if linear not in self._adapted:
            return None
        return {
            # The variance of torch's default for linears.
            "lora_a": InitRule("normal", std=(3 * self._adapted[linear]) ** -0.5),
            "lora_b": B_RULE,
            "magnitude": InitRule("constant", value=1.0),  # until `initialize_added`
        }.get(key)

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Cut A and B along the dimension that each shares with its matrix."""
        for name in plan.keys() & self._adapted.keys():
            style = plan[name]
            cut_by_rows = style.placement == Shard(1)
            whole = ("lora_b", "magnitude") if cut_by_rows else ("lora_a",)
            plan[name] = replace(style, whole=(*style.whole, *whole))

    def initialize_added(self, model: nn.Module | list[nn.Module]) -> None:
        """Start DoRA's magnitudes at the lengths of the matrices' rows, or load all of PEFT's.

        Collective.
        """
        parts = model if isinstance(model, list) else [model]
        if self.settings.adapter is not None:
            folder = Path(self.settings.adapter)
            adapters = read_peft(folder, self._family, _args_of(parts[0]))
            for name, parameter in (pair for part in parts for pair in part.named_parameters()):
                if name in adapters:
                    fill_part(parameter, adapters[name])
            return
        for linear in (module for part in parts for module in part.modules()):
            if isinstance(linear, LoraLinear) and linear._parameters["magnitude"] is not None:
                _set_magnitude(linear)

    def merge_added(self, name: str, weight: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return `W + scale * B A`, its rows scaled to the magnitudes, in the type of `weight`."""
        merged = torch.addmm(weight, added["lora_b"], added["lora_a"], alpha=self._scale)
        if "magnitude" in added:
            merged *= (added["magnitude"] / merged.norm(dim=1)).unsqueeze(1)
        return merged

    def write_added(self, folder: Path, added: Mapping[str, Tensor], base: StoredModel) -> None:
        """Write PEFT's format."""
        names, place = base.weights.tensors, str(base.path)
        settings, family, args = self.settings, base.family, base.args
        write_peft(folder, added, settings, family, args, weights=names, base=place)

    def read_added(self, folder: Path, base: StoredModel) -> dict[str, Tensor]:
        """Read PEFT's format."""
        return read_peft(folder, base.family, base.args)

    @contextmanager
    def without_adapters(self, model: nn.Module | list[nn.Module]) -> Iterator[None]:
        """Compute what the base computes while entered."""
        parts = model if isinstance(model, list) else [model]
        linears = [m for part in parts for m in part.modules() if isinstance(m, LoraLinear)]
        for linear in linears:
            linear.adapted = False
        try:
            yield
        finally:
            for linear in linears:
                linear.adapted = True

    def _targets(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        if globs := self.settings.targets:
            return [
                (name, linear)
                for name, linear in linears_of(model)
                if any(_matches(name, glob) for glob in globs)
            ]
        assert isinstance(model, LanguageModel)
        inside = {module for block in model.blocks().values() for module in block.modules()}
        return [(name, linear) for name, linear in linears_of(model) if linear in inside]


def scale_of(settings: LoraSettings) -> float:
    """Return the factor of `B A`."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def _args_of(model: nn.Module) -> DecoderArgs:
    args = model.args
    assert isinstance(args, DecoderArgs)
    return args


def _matches(name: str, glob: str) -> bool:
    """Match the whole name, or its last part."""
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[2], glob)


@torch.no_grad()
def _set_magnitude(linear: LoraLinear) -> None:
    """Set the magnitude to the lengths of the rows, of which a rank may hold a part."""
    (weight, part), magnitude = linear.frozen_parameter(), linear._parameters["magnitude"]
    assert magnitude is not None
    squares = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
    squares[local_indices(weight)[0]] = norms.square()
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        squares = squares.to(mesh.device_type)  # parameters may be in host memory
        for axis, placement in enumerate(weight.placements):
            if not isinstance(placement, Replicate):
                dist.all_reduce(squares, group=mesh.get_group(axis))
    held = local_indices(magnitude)[0].to(squares.device)
    local_tensor(magnitude).copy_(squares.sqrt()[held])
