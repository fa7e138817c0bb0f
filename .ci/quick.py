"""What makes tests quick where compiling and interpreting is most of their work: XLA without its costly passes, Triton's interpreter without what it computes over and over. Results stay what they are."""
import multiprocessing, os, subprocess, sys, tempfile
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
    "In this process: Triton's interpreter makes each shape, each type of a tuple, each name of NumPy's types and each patch of the language once, and does not look whether small indices overflow."
    try: import triton.language as tl, triton.runtime.interpreter as run; from triton.language import core, semantic
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

    blocks, shapes = {}, {}     # by the sizes: the shape of a type and its product; the shape of a tensor and its product, as constants
    def block(self, element_ty, shape):
        sizes = shape.values if isinstance(shape, core.tuple) else shape; key = tuple(s.value if type(s) is core.constexpr else s for s in sizes); hit = blocks.get(key)
        if hit is None: first(self, element_ty, shape); blocks[key] = self.shape, self.numel
        else: self.element_ty, (self.shape, self.numel) = element_ty, hit
    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar; key = tuple(type.shape.values) if type.is_block() else (); hit = shapes.get(key)
        if hit is None: make(self, handle, type); shapes[key] = self.shape, self.numel
        else: self.shape, self.numel = hit
    def broadcast(self, lhs, rhs):
        a, b = lhs.type, rhs.type; one, two = a.is_block(), b.is_block()
        return (lhs, rhs) if not (one or two) or one and two and a.shape is b.shape else spread(self, lhs, rhs)
    first, make, spread = core.block_type.__init__, core.tensor.__init__, semantic.TritonSemantic.broadcast_impl_value
    core.block_type.name = property(lambda self: f'<{self.shape}, {self.element_ty}>', lambda self, name: None)    # written when it is asked for
    core.block_type.__init__, core.tensor.__init__, semantic.TritonSemantic.broadcast_impl_value = block, tensor, broadcast

    patches, set_all = {}, run._patch_builtin
    class Kept(list):
        def set_attr(self, obj, name, value): self.append((obj, name, value))
    def patch(pkg, builder, scope):
        if id(pkg) not in patches: set_all(pkg, builder, found := Kept()); patches[id(pkg)] = found
        for what in patches[id(pkg)]: scope.set_attr(*what)
    run._patch_builtin = patch

def _run(code, args, env, out):
    "In the new process."
    for fd, file in zip((1, 2), out): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
    os.environ.clear(); os.environ.update(env); sys.argv = ['-c', *args]; sys.path[:0] = env.get('PYTHONPATH', '').split(os.pathsep)
    exec(compile(code, '<code>', 'exec'), {'__name__': '__main__'})

def forked(code, *args, timeout=250, **env):
    "Run Python code in a process of its own, forked from one that has imported PyTorch and nothing of this package; returns what `subprocess.run` does. `env` is added to the environment."
    ways = multiprocessing.get_context('forkserver'); ways.set_forkserver_preload(['torch'])
    with tempfile.TemporaryDirectory() as tmp:
        out = [os.path.join(tmp, name) for name in ('out', 'err')]; p = ways.Process(target=_run, args=(code, args, os.environ | env, out)); p.start(); p.join(timeout)
        if p.is_alive(): p.kill(); p.join(); raise subprocess.TimeoutExpired('forked', timeout)
        return subprocess.CompletedProcess(args, p.exitcode, *(Path(f).read_text() if os.path.exists(f) else '' for f in out))

def interpreted(code, timeout=250):
    "The same on the CPU, with Triton's kernels interpreted."
    here = Path(__file__).resolve().parent; path = os.pathsep.join([str(here.parent), str(here.parent/'tests'), str(here), os.environ.get('PYTHONPATH', '')])
    return forked('import quick; quick.interpreter()\n' + code, timeout=timeout, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=path)
