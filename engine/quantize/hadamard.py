"""Rotating the residual stream, so that no channel of it holds the outliers any more. What the model computes stays.

An RMSNorm without weights does not know the direction of its input: norm(x Q) = norm(x) Q for orthogonal Q. So the
weights of norms go into the layers that read them, and with x Q in the place of x

    embedding  E Q        what reads the stream  W Q        what writes to it  Q^T W, Q^T b        head  W Q

Values of each head are rotated by an R of their own: v's rows of a head become R^T W, o's columns W R. All of it is
done once, in float64; the rotated model runs like any other. Q is a Hadamard matrix over sqrt(n), its rows with signs:
every number becomes a mean of all, with equal weights. A tied head and embedding are no longer the same afterwards.

It pays where one scale covers many numbers: channels of 4 bits, activations with outliers; hardly for groups.

A Hadamard matrix of order n has entries 1 and -1 and H H^T = n. Orders here: 1, 2, p + 1 for primes p = 3 mod 4, and
2 (p + 1) for primes p = 1 mod 4 (Paley), and twice any of them (Sylvester), which is every multiple of 4 up to 32 and
every width of the customary models.

Source: Ashkboos et al., QuaRot, arXiv:2404.00456; Liu et al., SpinQuant, arXiv:2405.16406 (R1 and R2); Paley 1933.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from trine.engine.errors import UsageError
from trine.engine.model.blocks import Block
from trine.engine.model.layers import LayerNorm, Linear, RMSNorm
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.equivalent import places

_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def rotate(model: Transformer, *, seed: int = 0) -> None:
    """Rotate a model in place. Raises `UsageError`, before anything has changed, where its structure does not allow it.

    A tied head becomes one of its own (`model.config` says so). `seed`: of the signs.
    """
    blocks = [block for block in model.layers if isinstance(block, Block)]
    for block in blocks:
        _check(block)
    if not isinstance(model.norm, RMSNorm):
        raise UsageError(f"a {model.config.norm} norm takes means, which a rotation changes; leave out the rotation")
    width, head_dim = model.config.width, model.config.head_dim
    generator = torch.Generator().manual_seed(seed)
    signs_C = torch.randint(0, 2, (width,), generator=generator).to(torch.float64) * 2 - 1
    q_CC = signs_C[:, None] * hadamard(width)
    r_DD = hadamard(head_dim)

    if model.lm_head is None:
        _untie(model)
    assert model.lm_head is not None
    _fold(model.norm, [model.lm_head])
    for embedding in (model.embed_tokens, model.embed_positions):
        if embedding is not None:
            _set(embedding.weight, embedding.weight.double() @ q_CC)
    _set(model.lm_head.weight, model.lm_head.weight.double() @ q_CC)
    for block in blocks:
        _rotate_block(block, q_CC, r_DD)


def hadamard(order: int) -> Tensor:
    """An orthogonal matrix [n, n] in float64 with all entries of one size. Raises `UsageError` for an unknown order."""
    rest, doublings = order, 0
    while rest >= 1:
        core = _core(rest)
        if core is not None:
            for _ in range(doublings):
                core = torch.cat((torch.cat((core, core), 1), torch.cat((core, -core), 1)))
            scale: float = order**0.5
            return core / scale
        if rest % 2:
            break
        rest, doublings = rest // 2, doublings + 1
    raise UsageError(
        f"no Hadamard matrix of order {order} is known here, so it cannot be rotated; leave the rotation out"
    )


def _core(order: int) -> Tensor | None:
    """A Hadamard matrix that is not twice another one, or None."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4 == 0 and _is_prime(order - 1):  # order - 1 = 3 mod 4
        s = _bordered(order - 1, -1.0)
        return s + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if order % 4 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        s, one = _bordered(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
        return torch.cat((torch.cat((s + one, s - one), 1), torch.cat((s - one, -s - one), 1)))
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """[p + 1, p + 1]: 0 on the diagonal, a border of 1 and of `sign`, and inside 1 where i - j is a square modulo p."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
    numbers = torch.arange(prime)
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    found[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    found[0, 1:], found[1:, 0] = 1.0, sign
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


def _check(block: Block) -> None:
    if block.self_attn.qkv_clip is not None:
        raise UsageError(
            f"values are kept within {block.self_attn.qkv_clip}, which a rotation would change; leave the rotation out"
        )
    read = {place.before for place in places(block)}
    norms = {name for name, module in block.named_children() if isinstance(module, RMSNorm | LayerNorm)}
    layers = {place.layers for place in places(block) if place.before in norms}
    known = {name for names in layers for name in names} | set(_WRITERS)
    there = {name for name, module in block.named_modules() if isinstance(module, Linear)}
    if not norms <= read or there != known:
        raise UsageError(
            f"a layer with {block.placement} norms and {', '.join(sorted(there - known)) or 'no further parts'} cannot "
            "be rotated: every norm must stand before layers that are known; leave the rotation out"
        )


def _rotate_block(block: Block, q_CC: Tensor, r_DD: Tensor) -> None:
    for place in places(block):
        before = block.get_submodule(place.before)
        if isinstance(before, RMSNorm):
            readers = [block.get_submodule(name) for name in place.layers]
            _fold(before, readers)
            for name in place.layers:
                weight = block.get_parameter(f"{name}.weight")
                _set(weight, weight.double() @ q_CC)
    v, o = block.self_attn.v_proj, block.self_attn.o_proj
    for parameter in (v.weight, v.bias):
        if parameter is not None:
            heads = parameter.double().view(-1, len(r_DD), *parameter.shape[1:])
            _set(parameter, torch.einsum("kd...,de->ke...", heads, r_DD).reshape(parameter.shape))
    _set(o.weight, (o.weight.double().view(len(q_CC), -1, len(r_DD)) @ r_DD).flatten(1))
    for name in _WRITERS:
        layer = block.get_submodule(name)
        assert isinstance(layer, Linear)
        _set(layer.weight, q_CC.T @ layer.weight.double())
        if layer.bias is not None:
            _set(layer.bias, q_CC.T @ layer.bias.double())


def _fold(norm: RMSNorm, readers: list[nn.Module]) -> None:
    """The norm's weights into the layers that read it."""
    offset = 1.0 if norm.unit_offset else 0.0
    for layer in readers:
        assert isinstance(layer, Linear)
        _set(layer.weight, layer.weight.double() * (norm.weight.double() + offset))
    norm.weight.fill_(1.0 - offset)


def _untie(model: Transformer) -> None:
    embedding = model.embed_tokens.weight
    model.lm_head = Linear(
        model.config.width, model.config.vocab_size, bias=False, device=embedding.device, dtype=embedding.dtype
    )
    model.lm_head.weight.copy_(embedding)
    model.config = replace(model.config, tie_embeddings=False)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
