"""The loss of a causal language model without its logits: over chunks of tokens, with those of one alive.

    y = between(x . W^T + b)                              x [T, K]: the last hidden states;  y [T, V]
    loss = mean of log(sum(exp(y_t))) - y_t[target_t]     over the tokens t that count

At 16,384 tokens and a vocabulary of 128k, y and its gradient, each in two precisions, are 27 GB.  But the
head is the last layer and the loss one number, so a chunk's gradients are known once its logits are.  These
become their own gradient in place, and what stays of a chunk is its rows of dx and its term of dW.

`between` is what a model does to its head's product: nothing in most, a scale or a cap in some (Cohere,
Granite, Gemma 2).  `chunk_loss` finds it by running the model's own forward pass on symbols.  A model that
does more, or something to the hidden states, keeps its own forward pass and all its logits.

How many tokens are a chunk is a part of what is computed: dW is a sum over chunks, and a product's bits can
depend on its number of rows.  So it follows from the vocabulary alone, not from the batch, the device or the
workers.  A row's loss is float32, their sum float64; the sum of several chunks' dW is float32.

Letters: T tokens, K in_features of the head, V tokens of the vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from lowbit_dist.data import IGNORED
from lowbit_dist.linear import Product, View, decodes, plain_product, values
from lowbit_dist.machine import in_any_order

CHUNK = 2**27  # logits: 4,096 tokens of 32k, 1,024 of 128k, for which matrix products are large enough
BLOCKS = {"cpu": 2**18, "cuda": 2**24}  # of these in float32 at once: what a cache holds, or keeps a GPU busy
TERM = 2**26  # elements of a chunk's dW that are made at once, to be added
POINTWISE = {operator.mul, operator.truediv, torch.tanh, "mul", "div", "tanh", "float", "to"}

Between = Callable[[Tensor], Tensor]  # [..., V] -> [..., V], each logit by itself


def chunk_loss(model: Any) -> None:  # of a PreTrainedModel
    """Let a model that is given labels answer with the loss alone, made in chunks, if its own forward pass
    does no more than that (`why_whole`).
    """
    if why_whole(model) is None:
        graph = _traced(model)
        assert graph is not None, "else there is a reason"
        model.between = fx.GraphModule({}, graph).forward if _calls(graph) else None
        model.__class__ = _in_chunks(type(model))  # type: ignore[arg-type]  # a class can be hashed


@cache
def _in_chunks(whole: Any) -> Any:  # of a class
    @wraps(whole.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return whole.forward(self, *args, **inputs)
        from transformers.modeling_outputs import CausalLMOutput

        hidden = _body(self)(*args, **inputs)[0]
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        reduced = partial(cross_entropy, targets=targets, between=self.between)
        return CausalLMOutput(loss=self.get_output_embeddings()(hidden, reduced))

    return type(whole.__name__, (whole,), {"__module__": whole.__module__, "forward": forward})


def why_whole(model: Any) -> str | None:  # of a PreTrainedModel
    """Why a model's loss is made of all logits at once, if it is."""
    head = model.get_output_embeddings()
    if not decodes(head):
        return "has a head of its own kind"
    try:
        graph = _traced(model)
    except Exception as error:  # of whatever the model's own code asks of what it is given
        return f"cannot be followed from its hidden states to its loss ({type(error).__name__})"
    if graph is None:
        return "has more between its hidden states and its loss than a head"
    if more := _calls(graph) - POINTWISE:
        return f"does more to its logits than scale or cap them ({', '.join(sorted(map(str, more)))})"
    return None


def _body(model: Any) -> nn.Module:
    """The part of a model that is all of it but the head; transformers' `base_model` is not, of some."""
    embeddings = model.get_input_embeddings()
    return next(part for part in model.children() if any(m is embeddings for m in part.modules()))


class _Body(tuple[Tensor]):
    """What a body gives, whatever its class: the last hidden states, and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _calls(graph: fx.Graph) -> set[Any]:
    return {node.target for node in graph.nodes if node.op not in ("placeholder", "output")}


def _traced(model: Any) -> fx.Graph | None:
    """What becomes of the head's result until the loss is made of it, by the model's own forward pass between
    stand-ins for its body, its head and its loss; None if the head is not given what the body gives.
    """
    graph = fx.Graph()
    logits = fx.Proxy(graph.placeholder("logits"))
    hidden, tokens = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)
    to_head: list[Tensor] = []
    to_loss: list[fx.Proxy] = []

    def body(*_: Any, **__: Any) -> _Body:
        return _Body((hidden,))

    def head(x: Tensor) -> fx.Proxy:
        to_head.append(x)
        return logits

    def loss(logits: fx.Proxy, *_: Any, **__: Any) -> Tensor:
        to_loss.append(logits)
        return torch.zeros(())

    with (
        patch.object(_body(model), "forward", body),
        patch.object(model.get_output_embeddings(), "forward", head),
        patch.object(model, "_loss_function", loss, create=True),
    ):
        model.forward(input_ids=tokens, labels=tokens)
    is_body = [x.shape == hidden.shape and x.data_ptr() == hidden.data_ptr() for x in to_head]
    if is_body != [True] or len(to_loss) != 1:
        return None
    graph.output(to_loss[0].node)
    graph.eliminate_dead_code()
    return graph


def cross_entropy(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [V, K]
    bias: Tensor | None = None,  # [V]
    *,
    targets: Tensor,  # [...] int64: of each row of x, or IGNORED
    between: Between | None = None,
    view: View | None = None,
    product: Product = plain_product,
) -> Tensor:  # [] float32
    """The mean cross-entropy of the logits that `linear` would give, after `between`; NaN of no target."""
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    with torch.autocast(device, enabled=False):
        loss: Tensor = _CrossEntropy.apply(
            x.reshape(-1, x.shape[-1]), weight, bias, targets.reshape(-1),
            view, product, between, torch.is_grad_enabled(),
        )  # fmt: skip
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while a chunk's logits are there; the backward pass hands
    them over.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [T, K]
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,  # [T]
        view: View | None,
        product: Product,
        between: Between | None,
        is_training: bool,
    ) -> Tensor:
        w, own = values(weight), None
        if view is not None:
            w, own = view.forward(w)
        w = w.to(x.dtype)
        is_counted = targets != IGNORED
        n = is_counted.sum()
        share = is_counted / n  # [T] float32: the gradient of each row's loss
        row_losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        rows, n_terms = max(1, CHUNK // len(w)), max(1, TERM // x.shape[1])
        dx, dw, dbias = torch.empty_like(x), None, None
        if is_training:
            dw = torch.zeros_like(w, dtype=x.dtype if len(x) <= rows else torch.float32)
            dbias = None if bias is None and own is None else dw.new_zeros(len(w))

        def take(here: slice) -> None:
            y = product(x[here], w)
            for term in (bias, own):
                y = y if term is None else y.add_(term.to(y.dtype))
            row_losses[here] = _losses_(y, targets[here], share[here], between, is_training)
            if dw is not None:  # y is its own gradient now
                dx[here] = product(y, w.t(), of_gradient=True)
                for total, dy in zip(dw.split(n_terms), y.split(n_terms, dim=1), strict=True):
                    total += product(dy.t(), x[here].t(), of_gradient=True)
            if dbias is not None:
                dbias.add_(y.sum(0))

        for start in range(0, len(x), rows):
            take(slice(start, start + rows))
        ctx.weight, ctx.view, ctx.has_bias, ctx.has_own = weight, view, bias is not None, own is not None
        ctx.gradients = dx, None if dw is None else dw.to(x.dtype), dbias
        return (row_losses.double().where(is_counted, 0).sum() / n).float()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, dbias = (None if d is None else d.mul_(d_loss) for d in ctx.gradients)
        ctx.gradients = None  # they are handed over
        if ctx.view is not None:
            dw = ctx.view.backward(values(ctx.weight), dw, dbias if ctx.has_own else None)
        return dx, dw, dbias if ctx.has_bias else None, None, None, None, None, None


def _losses_(
    y: Tensor,  # [C, V] logits, in place of which are their gradients afterwards
    targets: Tensor,  # [C]
    share: Tensor,  # [C] float32: the gradient of each row's loss
    between: Between | None,
    is_training: bool,
) -> Tensor:  # [C] float32
    n = max(1, BLOCKS[y.device.type] // y.shape[1])
    parts = zip(y.split(n), targets.clamp(min=0)[:, None].split(n), share[:, None].split(n), strict=True)
    losses = []
    for part, target, d_loss in parts:
        seen, leaf = part, None
        if between is not None:
            with torch.set_grad_enabled(is_training):
                leaf = part.detach().requires_grad_(is_training)
                seen = between(leaf)
        log_p = seen.detach().log_softmax(1, dtype=torch.float32)
        losses.append(-log_p.gather(1, target)[:, 0])
        if is_training:
            gradient = log_p.exp_().mul_(d_loss)
            with in_any_order():  # one element of a row
                gradient.scatter_add_(1, target, -d_loss)
            if leaf is not None:
                (gradient,) = torch.autograd.grad(seen, leaf, gradient.to(seen.dtype))
            part.copy_(gradient)
    return torch.cat(losses)
