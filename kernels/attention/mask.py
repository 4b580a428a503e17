"""What may attend to what, said by meaning and never by a dense table, so that a kernel can skip what is hidden.

| argument of `make_mask` | query t of row b sees key s only when |
|---|---|
| causal | s <= p(t), where p(t) is t (then T == S), or query_positions_BT[b, t] |
| window = (left, right) | p(t) - left <= s <= p(t) + right; None is no limit; p(t) likewise |
| segment_ids_BT | s and t are of one document, a run of neighbouring tokens with one id (T == S) |
| key_lengths_B | s < key_lengths[b] (padding at the end) |

All of them combine, but for query_positions_BT with segment_ids_BT. A `Mask` is made once per forward pass and shared
by all layers. Documents are runs, so that nothing has to be asked of a device: an id that returns after another one
begins a new document, on every path. Positions may come in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels.attention.bounds import Bounds, Window, document_bounds, make_bounds, packed_bounds
from trine.kernels.attention.support import check_features
from trine.kernels.target import uses_triton


@dataclass(frozen=True, slots=True)
class Mask:
    """What may be attended to. Build it with `make_mask`.

    `bounds`: the mask as intervals, for the kernels; None where it is only causal or only full. For a CPU,
    `dense_B1TS`: boolean, True = attend; None where `causal` alone says it. `first_key_BT`: with causal documents,
    where each token's document begins. `position_BT`: where queries stand among the keys, None at their own number.
    `features`: names of `support.FEATURES`.
    """

    causal: bool
    dense_B1TS: Tensor | None = None
    first_key_BT: Tensor | None = None
    bounds: Bounds | None = None
    position_BT: Tensor | None = None
    features: frozenset[str] = frozenset()


def make_mask(
    *,
    causal: bool,
    num_keys: int,
    num_queries: int | None = None,
    query_positions_BT: Tensor | None = None,
    segment_ids_BT: Tensor | None = None,
    key_lengths_B: Tensor | None = None,
    window: Window = (None, None),
    device: torch.device | None = None,
) -> Mask:
    """Prepare a mask for `attention`; see the table above. Raises ValueError for a combination outside it.

    `num_queries` (default `num_keys`) and `device` are needed only where no tensor tells them.
    """
    if num_queries is None:
        num_queries = num_keys if query_positions_BT is None else query_positions_BT.shape[1]
    features = _features(causal, window, query_positions_BT, segment_ids_BT, key_lengths_B, num_queries != num_keys)
    _check_tensors(num_queries, num_keys, query_positions_BT, segment_ids_BT, key_lengths_B)
    check_window(causal, window)
    check_features(features)
    if query_positions_BT is not None and not (causal or window != (None, None)):
        raise ValueError("query_positions_BT needs causal=True or a window; without them a position means nothing")
    given = next((x for x in (query_positions_BT, segment_ids_BT, key_lengths_B) if x is not None), None)
    if given is None and window == (None, None):
        return Mask(causal=causal, features=features)
    if given is None and device is None:
        raise ValueError("a window alone does not tell the device; give device")
    plain = window == (None, None) and key_lengths_B is None
    if given is not None and plain and not uses_triton(given):
        return _cpu_mask(causal, num_keys, query_positions_BT, segment_ids_BT, features)
    standard = query_positions_BT is None
    if query_positions_BT is None:
        query_positions_BT = torch.arange(num_queries, device=device if given is None else given.device)[None]
    start_BT = end_BT = None
    if segment_ids_BT is not None:
        start_BT, end_BT = document_bounds(segment_ids_BT)
    if key_lengths_B is not None:
        lengths_BT = key_lengths_B[:, None].to(torch.int64)
        end_BT = lengths_BT if end_BT is None else torch.minimum(end_BT, lengths_BT)
    rows = [x.shape[0] for x in (query_positions_BT, start_BT, end_BT) if x is not None]
    positions_BT = query_positions_BT.to(torch.int64).expand(max(rows), -1)
    if end_BT is not None:
        end_BT = end_BT.expand_as(positions_BT)
    bounds = make_bounds(
        positions_BT,
        num_keys,
        causal=causal,
        window=window,
        start_BT=None if start_BT is None else start_BT.expand_as(positions_BT),
        end_BT=end_BT,
        ordered=standard or positions_BT.shape[1] == 1,
    )
    return _of_bounds(bounds, None if standard else positions_BT, causal, features)


def packed_mask(
    num_queries: int, num_keys: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *, causal: bool, window: Window
) -> Mask:
    """The mask of `attention_packed`. Raises ValueError for offsets that cannot be those of sequences."""
    check_window(causal, window)
    if cu_seqlens_k is None and num_queries != num_keys:
        raise ValueError(f"{num_queries} queries and {num_keys} keys need cu_seqlens_k")
    _check_offsets("cu_seqlens_q", cu_seqlens_q, num_queries)
    if cu_seqlens_k is not None:
        _check_offsets("cu_seqlens_k", cu_seqlens_k, num_keys)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(f"cu_seqlens_q has {len(cu_seqlens_q)} entries and cu_seqlens_k {len(cu_seqlens_k)}")
    features = {"packed", *(("causal",) if causal else ()), *(("window",) if window != (None, None) else ())}
    if cu_seqlens_k is not None:
        features.add("cross")
    bounds, position_BT = packed_bounds(num_queries, num_keys, cu_seqlens_q, cu_seqlens_k, causal=causal, window=window)
    return _of_bounds(bounds, None if cu_seqlens_k is None else position_BT, causal, frozenset(features))


def cross_mask(segment_ids_BT: Tensor, key_segment_ids_BS: Tensor) -> Mask:
    """Queries see the keys of their own number: packed targets over packed sources. Both ascend within a row.

    A query whose number no key has sees nothing. Raises ValueError for tensors that are no numbers of documents.
    """
    for name, tensor in (("segment_ids_BT", segment_ids_BT), ("key_segment_ids_BS", key_segment_ids_BS)):
        if tensor.dim() != 2 or tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected integers of 2 dimensions")
    if len(segment_ids_BT) != len(key_segment_ids_BS):
        raise ValueError(f"{len(segment_ids_BT)} rows of queries and {len(key_segment_ids_BS)} of keys; give as many")
    ids_BT, keys_BS = segment_ids_BT.to(torch.int64).contiguous(), key_segment_ids_BS.to(torch.int64).contiguous()
    start_BT, end_BT = torch.searchsorted(keys_BS, ids_BT), torch.searchsorted(keys_BS, ids_BT, right=True)
    num_keys = keys_BS.shape[1]
    bounds = make_bounds(start_BT, num_keys, causal=False, start_BT=start_BT, end_BT=end_BT)
    return _of_bounds(bounds, None, False, frozenset({"packed", "cross"}))


def check_window(causal: bool, window: Window) -> None:
    """Raises ValueError for a window that cannot be, or that a causal mask contradicts."""
    left, right = window
    if any(side is not None and side < 0 for side in window):
        raise ValueError(f"window {window} has a negative side; give the number of keys before and after, or None")
    if causal and right not in (None, 0):
        raise ValueError(f"window {window} looks ahead but causal=True forbids it; give ({left}, 0)")


def visible_keys(mask: Mask, q_BHTD: Tensor, k_BKSD: Tensor) -> Tensor | None:
    """The mask as booleans, True = attend, [B or 1, T, S]; None where everything is visible."""
    if mask.dense_B1TS is not None:
        return mask.dense_B1TS[:, 0]
    if not mask.causal:
        return None
    return torch.ones(1, q_BHTD.shape[2], k_BKSD.shape[2], dtype=torch.bool, device=q_BHTD.device).tril()


def _features(
    causal: bool,
    window: Window,
    query_positions_BT: Tensor | None,
    segment_ids_BT: Tensor | None,
    key_lengths_B: Tensor | None,
    cross: bool,
) -> frozenset[str]:
    present = {
        "causal": causal,
        "window": window != (None, None),
        "query_positions": query_positions_BT is not None,
        "segments": segment_ids_BT is not None,
        "key_lengths": key_lengths_B is not None,
        "cross": cross,
    }
    return frozenset(name for name, there in present.items() if there)


def _check_tensors(
    num_queries: int,
    num_keys: int,
    query_positions_BT: Tensor | None,
    segment_ids_BT: Tensor | None,
    key_lengths_B: Tensor | None,
) -> None:
    rows = {1}
    for name, tensor, dims in (
        ("query_positions_BT", query_positions_BT, 2),
        ("segment_ids_BT", segment_ids_BT, 2),
        ("key_lengths_B", key_lengths_B, 1),
    ):
        if tensor is None:
            continue
        if tensor.dim() != dims or tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected integers of {dims} dimensions")
        rows.add(tensor.shape[0])
    if len(rows) > 2:
        raise ValueError(f"the tensors of the mask have different numbers of rows: {sorted(rows)}")
    if query_positions_BT is not None and query_positions_BT.shape[1] != num_queries:
        raise ValueError(f"query positions of length {query_positions_BT.shape[1]} for {num_queries} queries")
    if segment_ids_BT is not None and segment_ids_BT.shape[1] != num_keys:
        raise ValueError(f"segment ids of length {segment_ids_BT.shape[1]} for {num_keys} keys; they must agree")


def _check_offsets(name: str, offsets: Tensor, num_rows: int) -> None:
    if offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {offsets.dtype} {tuple(offsets.shape)}; expected int32 or int64 [sequences + 1]")
    if offsets.device.type == "cpu" and (
        int(offsets[0]) != 0 or bool((offsets[1:] < offsets[:-1]).any()) or int(offsets[-1]) > num_rows
    ):
        raise ValueError(f"{name} must ascend from 0 to at most {num_rows}")


def _of_bounds(bounds: Bounds, position_BT: Tensor | None, causal: bool, features: frozenset[str]) -> Mask:
    dense = None if uses_triton(bounds.low_BT) else bounds.visible_BTS()[:, None]
    position_BT = None if position_BT is None else position_BT.to(torch.int32).contiguous()
    return Mask(causal, dense, bounds=bounds, position_BT=position_BT, features=features)


def _cpu_mask(
    causal: bool,
    num_keys: int,
    query_positions_BT: Tensor | None,
    segment_ids_BT: Tensor | None,
    features: frozenset[str],
) -> Mask:
    if query_positions_BT is not None:
        keys_S = torch.arange(num_keys, device=query_positions_BT.device)
        dense_BTS = keys_S <= query_positions_BT[..., None]
        return Mask(True, dense_BTS[:, None], position_BT=query_positions_BT, features=features)
    assert segment_ids_BT is not None
    if bool((segment_ids_BT == segment_ids_BT[:, :1]).all()):
        return Mask(causal, features=features)  # one document a row: nothing to hide
    start_BT, _ = document_bounds(segment_ids_BT)
    dense_BTS = start_BT[:, :, None] == start_BT[:, None, :]
    if not causal:
        return Mask(False, dense_BTS[:, None], features=features)
    return Mask(True, dense_BTS.tril()[:, None], first_key_BT=start_BT, features=features)
