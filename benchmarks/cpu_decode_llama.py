"""The contestant of `cpu_decode.py` that is llama.cpp, in a process of its own.

    PYTHON cpu_decode_llama.py name width feed layers heads vocabulary bf16|q8_0|q4_0 threads context steps

PYTHON needs llama-cpp-python, gguf and numpy, and nothing of Trine. It writes a model of random weights to a temporary
file and loads it; then each line on stdin is a turn of so many steps from a context of so many tokens, answered by one
line: the seconds of every step as JSON. A step is one token id to the most likely next one. The first line says which
version it is and which of the CPU's instructions it was built for.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

import numpy as np

KINDS = {"bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}


def write_model(path: str, width: int, feed: int, layers: int, heads: int, vocabulary: int, weights: str) -> None:
    """A Llama of random weights, with a vocabulary of bytes and made-up words."""
    import gguf  # type: ignore[import-not-found,unused-ignore]

    name, file_type = KINDS[weights]
    kind = gguf.GGMLQuantizationType[name]
    out, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    out.add_context_length(4096)
    out.add_embedding_length(width)
    out.add_block_count(layers)
    out.add_feed_forward_length(feed)
    out.add_head_count(heads)
    out.add_head_count_kv(heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(width // heads)
    out.add_vocab_size(vocabulary)
    out.add_file_type(file_type)
    words = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    words += [f"t{i}".encode() for i in range(vocabulary - len(words))]
    out.add_tokenizer_model("llama")
    out.add_token_list(words)
    out.add_token_scores([0.0] * vocabulary)
    out.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocabulary - 259))

    def matrix(tensor: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
        out.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(tensor: str) -> None:
        out.add_tensor(tensor, 1 + 0.1 * random.standard_normal(width, dtype=np.float32))

    matrix("token_embd.weight", vocabulary, width)
    matrix("output.weight", vocabulary, width)
    norm("output_norm.weight")
    for layer in range(layers):
        start = f"blk.{layer}."
        norm(f"{start}attn_norm.weight")
        norm(f"{start}ffn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{start}{part}.weight", width, width)
        matrix(f"{start}ffn_gate.weight", feed, width)
        matrix(f"{start}ffn_up.weight", feed, width)
        matrix(f"{start}ffn_down.weight", width, feed)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main(arguments: list[str]) -> None:
    """Serve turns until stdin ends."""
    import llama_cpp  # type: ignore[import-not-found,unused-ignore]

    name, weights = arguments[0], arguments[6]
    width, feed, layers, heads, vocabulary = map(int, arguments[1:6])
    threads, context, steps = map(int, arguments[7:10])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{name}-{weights}.gguf")
        write_model(path, width, feed, layers, heads, vocabulary, weights)
        model = llama_cpp.Llama(
            path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
    model.eval([300 + i for i in range(context)])
    system = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), flush=True)
    for _ in sys.stdin:
        model.n_tokens = context  # eval drops what lies behind
        token, seconds = 300, []
        for _ in range(steps):
            begin = time.perf_counter()
            model.eval([token])
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=(vocabulary,))
            token = int(logits.argmax())
            seconds.append(time.perf_counter() - begin)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
