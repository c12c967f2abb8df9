"""Low-bit training of any PyTorch model, without DeepSpeed, Ray, a process group or a configuration file.

    lowbit_dist.convert_(model, DQT(grid="ternary"))            its nn.Linears become the method's layers
    optimizer = lowbit_dist.Optimizer(model, AdamW(lr=1e-3))    used as any torch optimizer is

A low-bit weight is then a parameter of the same name and shape without storage; its codes are in
`weight.packed`, decoded while its layer multiplies, forward and backward.  Fifty steps of this end with the
digest of the distributed engine on one worker.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.linear import Linear, decodes
from lowbit_dist.methods.method import Method
from lowbit_dist.model import replace_linears, scale_every
from lowbit_dist.ops.states import dtype_of
from lowbit_dist.optim.clipping import clip_factor, global_norm
from lowbit_dist.optim.rule import Rule
from lowbit_dist.packed import PackedTensor, check_shape


class PackedParameter(nn.Parameter):
    """A low-bit weight outside ZeRO: one element of storage seen in the weight's shape, and its codes."""

    packed: "PackedWeight"

    @classmethod
    def of(cls, packed: "PackedWeight", dtype: torch.dtype, requires_grad: bool = True) -> "PackedParameter":
        parameter = cls(_stub(packed.tensor.shape, dtype, packed.tensor.codes.device), requires_grad)
        parameter.packed = packed
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedParameter":
        if id(self) not in memo:
            t = self.packed.tensor
            tensor = replace(t, codes=t.codes.clone(), scale=t.scale.clone())
            packed = PackedWeight(tensor, self.packed.seen)
            memo[id(self)] = PackedParameter.of(packed, self.dtype, self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return PackedParameter.of, (self.packed, self.dtype, self.requires_grad)


class PackedWeight:
    """All of a low-bit weight's codes, for the layer that multiplies with it."""

    in_layer = True

    def __init__(self, tensor: PackedTensor, seen: Callable[[PackedTensor], PackedTensor]):
        self.tensor, self.seen = tensor, seen  # `seen`: what the layer is given of it (`Method.seen`)

    def levels(self, shape: torch.Size) -> tuple[Tensor, Tensor]:  # [N, K] int8, [1 or N] float32
        seen = self.seen(self.tensor)
        return seen.levels(), seen.scale

    def dense(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        decoded = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        return self.seen(self.tensor).dequantize(decoded).to(dtype)


class PackedLinear(Linear):
    """The method's layer with a packed weight, which moves between devices and is saved as its codes."""

    weight: PackedParameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        t = self.weight.packed.tensor
        device = fn(t.codes.new_zeros(0)).device  # of what `fn` does, codes and scales take the device alone
        self.weight.packed.tensor = replace(t, codes=t.codes.to(device), scale=t.scale.to(device))
        self.weight.data = _stub(t.shape, self.weight.dtype, device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        del destination[f"{prefix}weight"]
        destination[f"{prefix}weight.codes"] = self.weight.packed.tensor.codes
        destination[f"{prefix}weight.scale"] = self.weight.packed.tensor.scale

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        t = self.weight.packed.tensor
        keys = f"{prefix}weight.codes", f"{prefix}weight.scale"
        codes, scale = (state_dict.get(key) for key in keys)
        if codes is None or scale is None:
            missing += [key for key in keys if key not in state_dict]
        elif codes.shape != t.codes.shape or scale.shape != t.scale.shape:
            errors.append(
                f"{prefix}weight has codes {list(codes.shape)} and scales {list(scale.shape)}; this layer "
                f"has {list(t.codes.shape)} and {list(t.scale.shape)}: it was converted by another method"
            )
        elif int(ops.code_counts(codes.to(t.codes.device), grid=t.grid).sum()) != t.planes * t.numel:
            errors.append(f"{keys[0]} has codes that the grid {t.grid.name} of this layer has not")
        else:
            with torch.no_grad():
                t.codes.copy_(codes)
                t.scale.copy_(scale)
        rest = {key: value for key, value in state_dict.items() if key not in keys}
        rest[f"{prefix}weight"] = self.weight
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)  # type: ignore[no-untyped-call]
        unexpected[:] = [key for key in unexpected if key not in keys]


def convert_(model: nn.Module, method: Method, *, keep: Collection[str] = ()) -> nn.Module:
    """Give `model` the method's layers in the place of its `nn.Linear`s, low-bit weights rounded from what
    they are; the model itself.

    The layer of a Hugging Face model that gives the logits stays as it is, and so do the modules that `keep`
    names, with all that is in them.  ValueError, before anything is changed, on a model without linear layers
    or with one whose weight is shared or cannot be packed.
    """
    kept = _kept(model, keep)
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and id(module) not in kept
    }
    if not layers or model in layers.values():
        raise ValueError(f"{type(model).__name__} has no nn.Linear to convert in it")
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, p in module._parameters.items():
            holders.setdefault(id(p), []).append(f"{name}.{key}")
    for name, layer in layers.items():
        if others := [holder for holder in holders[id(layer.weight)] if holder != f"{name}.weight"]:
            raise ValueError(f"layer {name}: its weight is {others[0]} too; keep both out of the conversion")
    if len(method.stages(100)) > 1 or method.nearest(100, 100) or method.threshold(1, 100) is not None:
        raise ValueError(
            f"{method.label} changes within a training, whose length convert_ does not know; train with a "
            "configuration"
        )
    if method.stored is not None:
        _check_packable(layers, method)
    before = {name for name, _ in model.named_parameters()}
    weights = replace_linears(model, method, is_head=lambda layer: id(layer) in kept)
    for name, parameter in model.named_parameters():
        if name not in before and (value := method.initial(name, tuple(parameter.shape))) is not None:
            parameter.data.copy_(value)
    for module in model.modules():
        if not isinstance(module, Linear) and any(p is not None for p in module._parameters.values()):
            module.register_forward_pre_hook(_sum_first)
    for name in weights if method.stored is not None else ():
        replaced: Any = model.get_submodule(name.removesuffix(".weight"))
        pack_(replaced, method.quantize(replaced.weight.detach().float()), method.seen)
    model.lowbit_method, model.linear_weights = method, weights  # type: ignore[assignment]
    return model


def _kept(model: nn.Module, keep: Collection[str]) -> set[int]:
    """The modules that stay."""
    if isinstance(keep, str):
        raise ValueError(f"keep is {keep!r}; it must be a list of names, like [{keep!r}]")
    known = dict(model.named_modules())
    if unknown := [name for name in keep if name not in known]:
        raise ValueError(f"keep names {unknown[0]!r}, which is no module of {type(model).__name__}")
    kept = {id(module) for name in keep for module in known[name].modules()}
    return kept | {id(getattr(model, "get_output_embeddings", lambda: None)())}


def _check_packable(layers: Mapping[str, nn.Linear], method: Method) -> None:
    if method.is_low_bit(False):
        raise ValueError(
            "convert_ packs linear layers alone, not embeddings and norms; train with a configuration"
        )
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        try:
            check_shape(shape, scale_every(method, shape))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None


def pack_(
    layer: Linear, tensor: PackedTensor, seen: Callable[[PackedTensor], PackedTensor] = lambda tensor: tensor
) -> None:
    """Let a layer multiply with packed codes in the place of its weight."""
    if not decodes(layer):
        raise ValueError(
            f"a {type(layer).__name__} cannot have a packed weight, which `Linear.forward` alone decodes"
        )
    packed = PackedWeight(tensor, seen)
    layer.weight = PackedParameter.of(packed, layer.weight.dtype, layer.weight.requires_grad)
    kind = type(layer)
    layer.__class__ = (
        PackedLinear if kind is Linear else type(f"Packed{kind.__name__}", (PackedLinear, kind), {})
    )


class _Boundary(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        return dx


def _sum_first(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """For a forward pre-hook: what a module (a norm, for instance) adds to the gradient of its input is
    summed before that of others is added.

    DeepSpeed's own hooks do so.  Sums of floats depend on their order: with it, both give the same bits.
    """
    return tuple(
        _Boundary.apply(x) if isinstance(x, Tensor) and x.requires_grad else x
        for x in inputs  # type: ignore[no-untyped-call]
    )


def _stub(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One zero, seen in a weight's shape: autograd wants that alone."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


def _check_applies(rule: Rule, methods: Collection[Method]) -> None:
    """ValueError if a part of the rule is for what is not there: `methods` are those of converted models."""
    is_of_linear = rule.of(is_linear=True) != rule.of(is_linear=False)
    if not methods and (is_of_linear or rule.linear_lr_ratio != 1):
        what = f"{rule.name} is a rule" if is_of_linear else f"linear_lr_ratio {rule.linear_lr_ratio:g} is"
        raise ValueError(
            f"{what} of linear layers, and which are those convert_ says; convert_ the model first, to "
            "Dense() with keep=[HEAD] for one of full precision"
        )


class Optimizer(torch.optim.Optimizer):
    """A rule (`lowbit_dist.optim`) as a torch optimizer, for models from `convert_` and any other.

    Learning rate and weight decay of its groups are the rule's, times `Rule.rates`; schedulers of
    torch change `lr` as usual.  The gradient of all parameters is clipped to `clip_norm` (0: not at all),
    and one that is not finite changes nothing.  Rounding is a function of `seed`, the step and the position.
    ValueError where nothing in the model would have the rule, as Muon, or its rate for linear layers.
    """

    def __init__(self, model: nn.Module, rule: Rule, *, seed: int = 0, clip_norm: float = 0.0):
        self.rule, self.seed, self.clip_norm = rule, seed, clip_norm
        # A converted model may be a part of this one, or wrapped: its method's names begin where it begins.
        methods = {n: m.lowbit_method for n, m in model.named_modules() if "lowbit_method" in m.__dict__}
        _check_applies(rule, methods.values())
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        self.ids: dict[Tensor, int] = {}
        # A parameter that is not the model's may be added to a group later.
        self.rules: defaultdict[Tensor, Rule] = defaultdict(partial(rule.of, is_linear=False))
        self.methods: dict[Tensor, Method] = {}
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            self.ids[p] = i  # random bits depend on it
            owner = max((n for n in methods if not n or name.startswith(f"{n}.")), key=len, default=None)
            method: Method = Method(name="none") if owner is None else methods[owner]
            inner = name if not owner else name[len(owner) + 1 :]
            is_linear = owner is not None and inner in model.get_submodule(owner).linear_weights  # type: ignore[operator]
            self.rules[p], self.methods[p] = rule.of(is_linear=is_linear), method
            if not p.requires_grad:
                continue
            if not isinstance(p, PackedParameter) and (p.dtype != torch.float32 or not p.is_contiguous()):
                what = p.dtype if p.dtype != torch.float32 else "not contiguous"
                raise ValueError(
                    f"{name} is {what}; ordinary parameters must be contiguous float32 (autocast computes "
                    "in bf16)"
                )
            rates = rule.rates(method, inner, tuple(p.shape), is_linear=is_linear)
            group = {
                "params": [],
                "lr": rule.lr * rates[0],
                "weight_decay": rule.weight_decay * rates[1],
                "step": 0,
            }
            groups.setdefault(rates, group)["params"].append(p)
        defaults = {"lr": rule.lr, "weight_decay": rule.weight_decay, "step": 0}  # of a group that is added
        super().__init__(list(groups.values()), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step with the gradients that parameters have."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return loss
        gradients = [p.grad for p, _ in moved if p.grad is not None]
        norm = global_norm(gradients, sum(g.numel() for g in gradients), over_workers=False).item()
        if not math.isfinite(norm):
            return loss
        for group in self.param_groups:
            group["step"] += 1
        for p, group in moved:
            now = ops.Now(
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                step=group["step"],
                seed=self.seed,
                grad_scale=clip_factor(norm, self.clip_norm),
            )
            self._move(p, now)
        return loss

    def _move(self, p: Tensor, now: ops.Now) -> None:
        assert p.grad is not None, "parameters without a gradient are left out"
        scale = None
        if isinstance(p, PackedParameter):
            t = p.packed.tensor
            scale = self.methods[p].rescaled(t.as_shard())
            target: ops.Codes | ops.Weights = ops.Codes(
                t.codes,
                t.scale,
                t.scale_every,
                t.grid,
                self.ids[p],
                first_block=0,
                residual=self._residual(p),
                next_scale=scale,
            )
        else:
            target = ops.Weights(p.data.view(-1))
        state, rule = self._stored(p), self.rules[p]
        if rule.scope == "element":
            ops.step_(target, p.grad.reshape(-1), state, rule=rule, now=now)
        elif rule.scope == "shard":
            rule.step_(target, p.grad.reshape(-1), state, now=now, shape=tuple(p.shape))
        else:
            ops.whole_step_(target, p.grad, state, rule=rule, now=now)
        if isinstance(target, ops.Codes) and scale is not None:
            target.scale.copy_(scale)

    def _residual(self, p: Tensor) -> ops.Residual | None:
        if (kept := self.methods[p].accumulator) is None:
            return None
        state = self.state[p]
        if "residual" not in state:
            state["residual"] = kept.residual(p.numel(), p.device).values
        return ops.Residual(state["residual"], kept)

    def _stored(self, p: Tensor) -> list[ops.Stored]:
        """The rule's slots of a parameter, which lie in `state` as plain tensors, to be saved."""
        state = self.state[p]
        rule = self.rules[p]
        if any(slot.name not in state for slot in rule.slots):
            for fresh in rule.initial_state(tuple(p.shape), device=p.device):
                state |= {fresh.slot.name: fresh.values, f"{fresh.slot.name}/scale": fresh.scale}
        return [ops.Stored(slot, state[slot.name], state[f"{slot.name}/scale"]) for slot in rule.slots]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts a parameter's state to the parameter's type; slots have types of their own."""
        exact = copy.copy(state_dict["state"])
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in exact.items():
            p = params[i]
            states = self.rules[p].states
            for slot in self.rules[p].slots:
                if state[slot.name].dtype != (wanted := dtype_of(slot, states)):
                    raise ValueError(
                        f"the state's {slot.name} is {state[slot.name].dtype}; with states {states} it must "
                        f"be {wanted}"
                    )
            self.state[p] = {
                key: None if x is None else x.to(p.device, copy=True) for key, x in state.items()
            }
