"""The handler `qlora`: `lora` whose adapted matrices are held in 4 or 8 bits.

QLoRA (https://arxiv.org/abs/2305.14314). A matrix is quantised as it is loaded, part by part, and
dequantised whenever it is multiplied with, in the backward again, so no wide copy outlives its
product. Checkpoints leave it out like every base; a resume quantises it again, to the same bytes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.lora import LoraHandler, LoraLinear
from torchtitan.handlers.quantised import BLOCK, dequantize, has_kernels, packed, quantize
from torchtitan.handlers.settings import QloraSettings
from torchtitan.models.spec import InitRule
from torchtitan.parallel.initialize import initialize_tensors
from torchtitan.parallel.tensor_parallel import ParallelStyle
from torchtitan.utils.torch_compat import local_tensor
from torchtitan.weights.made_tensors import MadeTensors

logger = logging.getLogger(__name__)

CODES = {4: "weight_nf4", 8: "weight_int8"}
"""Names of the codes, by their bits."""
SCALE = "weight_scale"


class _QuantisedProduct(torch.autograd.Function):
    """`W x + bias` of frozen W and bias; keeps the codes for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        bits: int,
        with_kernels: bool,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.bits, ctx.with_kernels = bits, with_kernels
        return F.linear(x, dequantize(codes, scale, bits, x.dtype, with_kernels), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        codes, scale = ctx.saved_tensors
        weight = dequantize(codes, scale, ctx.bits, grad.dtype, ctx.with_kernels)
        return grad @ weight, None, None, None, None, None


class QloraLinear(LoraLinear):
    """A `LoraLinear` whose matrix is quantised: codes `[out, in / 2 or in]`, and scales."""

    bits: int
    with_kernels: bool = False
    """Dequantise by bitsandbytes, to the same bits."""

    def frozen_product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Map `[..., in]` to `[..., out]` without the adapter."""
        codes, scale = getattr(self, CODES[self.bits]), getattr(self, SCALE)
        return _QuantisedProduct.apply(input, codes, scale, bias, self.bits, self.with_kernels)

    def frozen_matrix(self) -> Tensor:
        """Return the matrix that the adapter is added to, in the adapter's type."""
        codes, scale = getattr(self, CODES[self.bits]), getattr(self, SCALE)
        return dequantize(codes, scale, self.bits, self.lora_a.dtype, self.with_kernels)

    def frozen_parameter(self) -> tuple[Tensor, Tensor]:
        """Return a parameter with the matrix's rows, and this rank's part of the matrix."""
        codes, scale = self._parameters[CODES[self.bits]], self._parameters[SCALE]
        assert codes is not None and scale is not None
        part = dequantize(local_tensor(codes), local_tensor(scale), self.bits, self.lora_a.dtype)
        return codes, part


class QloraHandler(LoraHandler):
    """Adds adapters to linears, and quantises these."""

    name = "qlora"
    settings: QloraSettings

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        super().__init__(job_config, parallel_dims)
        self.bits = self.settings.bits
        self._seed, self._degree = job_config.debug.seed, parallel_dims.tp
        self._rule: Callable[[str], InitRule] | None = None
        self._outputs: dict[str, int] = {}
        self._filled: set[str] = set()
        """Linears whose matrices were loaded."""
        self._quantises = True

    def _check_targets(self, model: nn.Module) -> list[ConfigIssue]:
        if problems := super()._check_targets(model):
            return problems
        for name, linear in self._targets(model):
            if linear.in_features % BLOCK:
                problem = (
                    f"{name} has {linear.in_features} inputs, and blocks of {BLOCK} share a scale"
                )
                fix = f"use lora, or targets whose inputs are multiples of {BLOCK}"
                return [ConfigIssue(f"handlers.{self.name}", problem, fix)]
        return []

    def convert(self, model: nn.Module) -> None:
        """Freeze the model and add the adapters. Raises ConfigError for targets that do not fit."""
        self._rule = model.init_rule  # type: ignore[assignment]
        super().convert(model)
        named = model.named_modules(remove_duplicate=False)
        linears = {name: linear for name, linear in named if name in self._adapted}
        self._outputs = {name: linear.out_features for name, linear in linears.items()}  # type: ignore[misc]

    def _adapt(self, linear: nn.Linear) -> None:
        super()._adapt(linear)
        if not self._quantises:
            return
        linear.__class__ = QloraLinear
        assert isinstance(linear, QloraLinear)
        linear.bits, (rows, columns) = self.bits, linear.weight.shape
        codes_per_element, dtype = packed(self.bits)
        codes = torch.empty(rows, columns // codes_per_element, dtype=dtype)
        scale = torch.empty(rows, columns // BLOCK, dtype=self.base_dtype)
        del linear.weight
        for key, tensor in ((CODES[self.bits], codes), (SCALE, scale)):
            parameter = nn.Parameter(tensor, requires_grad=False)
            parameter.num_weights = 0 if key == SCALE else rows * columns  # type: ignore[attr-defined]
            linear.register_parameter(key, parameter)

    def init_rule(self, name: str) -> InitRule | None:
        """Return the rule of a parameter that was added; matrices get values later."""
        linear, _, key = name.rpartition(".")
        if linear in self._adapted and key in (CODES[self.bits], SCALE):
            return InitRule("constant", value=0.0)
        return super().init_rule(name)

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Cut A and B like their matrix. Raises ConfigError where a cut would divide a block."""
        super().extend_tp_plan(plan)
        key, degree = "parallelism.tensor_parallel_degree", self._degree
        for name in sorted(plan.keys() & self._outputs.keys()):
            placement, inputs, outputs = (
                plan[name].placement,
                self._adapted[name],
                self._outputs[name],
            )
            if placement == Shard(1) and inputs % (degree * BLOCK):
                problem = f"would cut the {inputs} inputs of {name} within blocks of {BLOCK}"
                fix = f"use one that leaves each rank a multiple of {BLOCK} inputs, or lora"
                raise ConfigError(ConfigIssue(key, f"{problem}, which share a scale", fix, degree))
            if placement == Shard(0) and outputs % degree:
                problem = f"does not divide the {outputs} outputs of {name}, which is quantised"
                raise ConfigError(ConfigIssue(key, problem, "use one that does, or lora", degree))

    def made_of(self, tensors: Mapping[str, Tensor]) -> dict[str, MadeTensors]:
        """Return, by the names of plain matrices, how their quantised ones are made of them."""
        made = {}
        for linear in self._adapted if self._quantises else ():
            names = f"{linear}.{CODES[self.bits]}", f"{linear}.{SCALE}"
            if all(name in tensors for name in names):
                store = partial(self._store, linear, *(tensors[name] for name in names))
                like, factor = tensors[names[0]], packed(self.bits)[0]
                made[f"{linear}.weight"] = MadeTensors(names, like, factor, store, self._restored)
        return made

    @torch.no_grad()
    def _store(self, linear: str, codes: Tensor, scale: Tensor, weight: Tensor) -> None:
        found = quantize(local_tensor(weight), self.bits, self.base_dtype)
        for tensor, values in zip((codes, scale), found, strict=True):
            local_tensor(tensor).copy_(values)
        self._filled.add(linear)

    def _restored(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = parts
        return dequantize(codes, scale, self.bits, dtype)

    def initialize_added(self, model: nn.Module | list[nn.Module]) -> None:
        """Quantise the first values of matrices that were not loaded, then do as `lora` does."""
        assert self._rule is not None
        for part in model if isinstance(model, list) else [model]:
            for name, made in self.made_of(dict(part.named_parameters())).items():
                if name.removesuffix(".weight") not in self._filled:
                    weight = made.allocate(at_least=self.base_dtype)
                    initialize_tensors([(name, weight)], self._rule, self._seed)
                    made.store(weight)
        super().initialize_added(model)

    def after_load(self, model: nn.Module | list[nn.Module]) -> None:
        """Let the matrices be dequantised by bitsandbytes, if it is installed."""
        if self.bits != 4 or not has_kernels():
            return
        logger.info("Matrices in NF4 are dequantised by bitsandbytes.")
        for part in model if isinstance(model, list) else [model]:
            for module in part.modules():
                if isinstance(module, QloraLinear):
                    module.with_kernels = True

    def merge_added(self, name: str, weight: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Merge into the dequantised matrix, with which the adapter was trained."""
        codes, scale = quantize(weight, self.bits, self.base_dtype)
        return super().merge_added(name, dequantize(codes, scale, self.bits, weight.dtype), added)

    @contextmanager
    def on_plain_base(self) -> Iterator[bool]:
        """Convert models without quantising while entered: that is how peft loads an adapter."""
        self._quantises = False
        try:
            yield True
        finally:
            self._quantises = True
