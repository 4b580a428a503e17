"""Two training steps of a tiny model, as a program: run with and without TRITON_INTERPRET=1, its results must agree.

    python tests/interpreter/training_step.py MODEL OUT

Writes OUT: loss, gradients of the first step, parameters after two updates (safetensors), with the names of the Triton
kernels that ran as metadata.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.objectives import CausalLM
from trine.engine.model.config import ModelConfig, MoeConfig, RopeConfig
from trine.engine.model.transformer import Transformer
from trine.engine.train.optim import Optimizer
from trine.engine.train.recipe import OptimSettings
from trine.engine.train.step import Micro, accumulate_gradients, check_and_clip
from trine.kernels.hardware import INTERPRETING

LLAMA = ModelConfig(
    family="llama",
    vocab_size=61,
    width=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_width=40,
    max_positions=64,
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"family": "qwen3", "qk_norm": "head", "head_dim": 16, "tie_embeddings": True},
    "gpt2": {
        "family": "gpt2",
        "norm": "layer",
        "positions": "learned",
        "rope": None,
        "num_kv_heads": 4,
        "qkv_bias": True,
        "o_bias": True,
        "mlp": "plain",
        "mlp_bias": True,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
    },
    "gemma2": {
        "family": "gemma2",
        "norm": "rms_offset",
        "placement": "both",
        "activation": "gelu_tanh",
        "window": 9,
        "full_layers": (1,),
        "attention_scale": 0.3,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "embedding_scale": 6.9,
        "tie_embeddings": True,
    },
    "gpt_oss": {
        "family": "gpt_oss",
        "rope": RopeConfig(kind="yarn", factor=4.0, original_max_positions=16, truncate=False, attention_factor=1.14),
        "window": 9,
        "full_layers": (1,),
        "qkv_bias": True,
        "o_bias": True,
        "attention_sinks": True,
        "moe": MoeConfig(
            num_experts=4, top_k=2, ffn_width=24, order="top_k_softmax", router_bias=True, expert_bias=True, limit=0.5
        ),
    },
}


def make_model(name: str) -> Transformer:
    """Every parameter away from its initial value."""
    model = Transformer(dataclasses.replace(LLAMA, **MODELS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return model


def make_batch(step: int, *, packed: bool) -> Batch:
    """Two rows of 37 tokens, a few targets ignored; packed: two documents in each row."""
    generator = torch.Generator().manual_seed(10 + step)
    ids_BT = torch.randint(LLAMA.vocab_size, (2, 37), generator=generator)
    targets_BT = torch.randint(LLAMA.vocab_size, (2, 37), generator=generator)
    targets_BT[:, ::9] = IGNORED
    places_BT = torch.arange(37).expand(2, 37)
    cut_B1 = torch.tensor([[11], [20]])
    second_BT = places_BT >= cut_B1
    return Batch(
        ids_BT=ids_BT,
        targets_BT=targets_BT,
        segment_ids_BT=second_BT.long() if packed else None,
        positions_BT=torch.where(second_BT, places_BT - cut_B1, places_BT) if packed else None,
        num_valid=int((targets_BT != IGNORED).sum()),
    )


def run(name: str) -> dict[str, Tensor]:
    """Loss, gradients and updated parameters; the second step is packed."""
    model = make_model(name)
    optimizer = Optimizer(model, OptimSettings(name="muon", lr=1e-3, muon_lr=1e-2))
    found: dict[str, Tensor] = {}
    for step in range(2):
        batch = make_batch(step, packed=step == 1)
        model.zero_grad()
        loss = accumulate_gradients(
            model,
            CausalLM(),
            [Micro(0, batch)],
            num_valid=[batch.num_valid],
            seed=0,
            compute_dtype=torch.float32,
            checkpoint_activations=step == 1,
        )
        found[f"loss.{step}"] = loss.clone()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"grad.{step}.{name}": grad.clone() for name, grad in gradients.items()}
        result = check_and_clip(model, loss, max_norm=0.5, step=step)
        found[f"norm.{step}"] = torch.tensor(result.grad_norm)
        optimizer.step(1.0)
    return found | {f"parameter.{name}": p.detach() for name, p in model.named_parameters()}


def main() -> None:
    """Run the named model, write the results."""
    kernels: set[str] = set()
    lighter = nullcontext()
    if INTERPRETING:
        lighter = runpy.run_path(str(Path(__file__).with_name("lighter.py")))["lighter_interpreter"]()
        from triton.runtime.interpreter import InterpretedFunction

        original = InterpretedFunction.run

        def watched(self: Any, *arguments: Any, **options: Any) -> Any:
            kernels.add(f"{self.fn.__module__.removeprefix('trine.kernels.')}.{self.fn.__name__}")
            return original(self, *arguments, **options)

        InterpretedFunction.run = watched
    with lighter:
        results = run(sys.argv[1])
    save_file({n: t.contiguous() for n, t in results.items()}, sys.argv[2], {"kernels": json.dumps(sorted(kernels))})


if __name__ == "__main__":
    main()
