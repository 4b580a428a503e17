"""One request decoded by the engine and by transformers, family by family.

    python -m trine.benchmarks.families [--threads N] [--rounds N] [FAMILY...]

Models of one size (512 wide, 8 layers, random weights, bfloat16) are made and saved by transformers and loaded by
Trine. Both complete a prompt of 64 tokens by 64 (encoder-decoders read it as a source), greedily, in turns; ratios are
medians of the rounds', in time on the core with one thread. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trine.benchmarks.generation_peers import make_tokenizer
from trine.engine.env import environment
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.offline import complete
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model

PROMPT, NEW = list(range(100, 164)), 64
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
GROUPED = SIZES | {"num_key_value_heads": 4}
HEADS = GROUPED | {"head_dim": 64}
EXPERTS = HEADS | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 688}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "rope_theta": 10000.0} | {
    "original_max_position_embeddings": 4096
}
# What transformers calls the sizes of each family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS | {"query_pre_attn_scalar": 64},
    "gemma3_text": HEADS | {"query_pre_attn_scalar": 64},
    "olmo2": GROUPED,
    "granite": GROUPED,
    "smollm3": GROUPED | {"pad_token_id": None},
    "cohere": GROUPED,
    "gpt_neox": SIZES,
    "phi": SIZES,
    "starcoder2": GROUPED,
    "gpt2": {"n_embd": 512, "n_layer": 8, "n_head": 8, "n_inner": 1376},
    "opt": {"hidden_size": 512, "ffn_dim": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"word_embed_proj_dim": 512},
    "qwen3_moe": EXPERTS,
    "phi3_longrope": GROUPED | {"model_type": "phi3", "pad_token_id": None, "rope_parameters": LONGROPE},
    "cohere_qk_norm": GROUPED | {"model_type": "cohere", "use_qk_norm": True},
    "olmoe_clip": GROUPED | {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2, "clip_qkv": 8.0},
    "opt_350m": {"model_type": "opt", "hidden_size": 512, "ffn_dim": 1376, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "word_embed_proj_dim": 256, "do_layer_norm_before": False},
    "t5": {"d_model": 512, "d_ff": 1376, "num_layers": 8, "num_heads": 8, "feed_forward_proj": "gated-gelu"}
    | {"tie_word_embeddings": False, "decoder_start_token_id": 0},
    "marian": {"d_model": 512, "encoder_layers": 8, "decoder_layers": 8, "encoder_attention_heads": 8}
    | {"decoder_attention_heads": 8, "encoder_ffn_dim": 1376, "decoder_ffn_dim": 1376, "decoder_start_token_id": 0}
    | {"pad_token_id": 0, "forced_eos_token_id": None},
}
ENCODER_DECODERS = {"t5", "marian"}


def compare(family: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, and the ratios of the rounds."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(**{"model_type": family, "vocab_size": 8192} | FAMILIES[family])
    config.eos_token_id = None
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    theirs = kind.from_config(config).bfloat16().eval()
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(name)
        model = load_model(Path(name), dtype=torch.bfloat16)
    engine = Engine(model, make_tokenizer(), EngineConfig(max_running=1))
    params, ids = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True), torch.tensor([PROMPT])

    def seconds(call: Any) -> float:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        call()
        return clock() - began

    contestants = {
        "trine": lambda: list(complete(engine, [PROMPT], params)),
        "transformers": lambda: theirs.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False),
    }
    turns = [{name: seconds(call) for name, call in contestants.items()} for _ in range(rounds + 1)][1:]
    ratios = [turn["transformers"] / turn["trine"] for turn in turns]
    return {
        "parameters": sum(parameter.numel() for parameter in theirs.parameters()),
        "compiled_steps": engine.num_decode_steps > 0,
        "tokens_per_second": {n: round(NEW / statistics.median(turn[n] for turn in turns), 1) for n in contestants},
        "ratio": [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))],
    }


@torch.no_grad()
def main() -> None:
    """Print a line for each family, and all of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.families", description="Decoding by family.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"no sizes for {', '.join(sorted(unknown))}; known are {', '.join(FAMILIES)}")
    torch.set_num_threads(options.threads)
    rows = {}
    for family in options.families or FAMILIES:
        row = rows[family] = compare(family, options.rounds)
        speeds = ", ".join(f"{name} {value:.0f} tokens/s" for name, value in row["tokens_per_second"].items())
        steps = "compiled steps" if row["compiled_steps"] else "operation by operation"
        print(f"{family:14} {speeds}: {row['ratio'][0]:.2f} x ({row['ratio'][1]} to {row['ratio'][2]}), {steps}")
    print(json.dumps({"threads": options.threads, "families": rows, "environment": environment()}))


if __name__ == "__main__":
    main()
