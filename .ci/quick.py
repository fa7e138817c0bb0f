"""What makes tests quick where compiling and interpreting is most of their work: XLA without its costly passes, Triton's interpreter without what it computes over and over. Results stay what they are."""
import os, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

def xla():
    "Variables of the environment with which XLA compiles small programs twice to three times as fast, for processes that have not imported JAX yet."
    env = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    try: known = version('jaxlib').startswith('0.10.')     # at a flag that its version does not know XLA ends the process
    except PackageNotFoundError: known = False
    if known: env['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    return env

def interpreter():
    "In this process: Triton's interpreter keeps its types of tuples and its names of NumPy's types, and does not look whether small indices overflow."
    try: import triton.language as tl, triton.runtime.interpreter as run; from triton.language import core
    except ImportError: return
    names, np_dtype, made, tuple_type = {}, run._get_np_dtype, {}, core._type_for_tuple_values
    def kept_dtype(t):
        s = t.element_ty if isinstance(t, tl.block_type) else t
        if isinstance(s, tl.pointer_type): return np_dtype(t)
        return names.get(s.name) or names.setdefault(s.name, np_dtype(s))
    def kept_type(values, fields=None):
        if fields is not None or not all(type(v) is core.constexpr and type(v.value) is int for v in values): return tuple_type(values, fields)
        key = tuple(v.value for v in values)
        return made.get(key) or made.setdefault(key, tuple_type(values))
    run._get_np_dtype, core._type_for_tuple_values = kept_dtype, kept_type
    object.__setattr__(run.interpreter_builder.options, 'sanitize_overflow', False)

def interpreted(code, timeout=250):
    "Run Python code in a process of its own, on the CPU, with Triton's kernels interpreted; returns what `subprocess.run` does."
    here = Path(__file__).resolve().parent
    env = os.environ | {'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.pathsep.join([str(here.parent), str(here.parent/'tests'), str(here), os.environ.get('PYTHONPATH', '')])}
    return subprocess.run([sys.executable, '-c', 'import quick; quick.interpreter()\n' + code], env=env, capture_output=True, text=True, timeout=timeout)
