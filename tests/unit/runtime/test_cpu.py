"""The CPU adaptation: what Megatron-Core sees, and that nobody else sees it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cpt.runtime.compat import TRITON_MODULES
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="inert where CUDA is available")


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter, where nothing has been imported yet."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_megatron_sees_the_cpu_and_torch_is_untouched() -> None:
    adapt_megatron_core_to_cpu()
    import megatron.core.optimizer.optimizer as engine

    seen = engine.torch
    assert seen.zeros(2, device="cuda").device.type == "cpu"
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.cuda.is_available() is False  # never faked
    assert seen.Tensor is torch.Tensor and seen.nn is torch.nn
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2).cuda()
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_second_call_changes_nothing() -> None:
    adapt_megatron_core_to_cpu()
    finders = list(sys.meta_path)
    assert adapt_megatron_core_to_cpu() is True
    assert sys.meta_path == finders


def test_an_exchange_of_one_rank_copies_nothing_and_of_others_is_made() -> None:
    from megatron_cpt.runtime.cpu import _unless_alone

    asked = []

    class Group:
        def __init__(self, size: int) -> None:
            self.size = lambda: size

    collective = _unless_alone(lambda output, input, group=None, async_op=False: asked.append(group))
    source, alone, pair = torch.arange(3.0), Group(1), Group(2)
    target = torch.zeros(3)
    collective(target, source, group=alone)
    assert torch.equal(target, source) and not asked
    collective(target, source, group=alone, async_op=True).wait()
    for group in (pair, None):
        collective(target, source, group=group)
    assert asked == [pair, None]


def test_too_late_is_noticed() -> None:
    code = """
import sys, types
sys.modules["megatron.core.foo"] = types.ModuleType("megatron.core.foo")
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
try:
    adapt_megatron_core_to_cpu()
except AssertionError as error:
    print(error)
"""
    assert "before it could be adapted" in run_python(code)


def test_inert_where_cuda_is_available() -> None:
    code = """
import sys, torch
torch.cuda.is_available = lambda: True
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
before, cuda = list(sys.meta_path), torch.Tensor.cuda
print(adapt_megatron_core_to_cpu(), sys.meta_path == before, torch.Tensor.cuda is cuda)
"""
    assert run_python(code) == "False True True"


def test_transformers_loads_correctly_in_the_same_process(tmp_path: Path) -> None:
    """A global patch of torch's factories made `from_pretrained` leave inv_freq as uninitialised memory."""
    code = f"""
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
adapt_megatron_core_to_cpu()
import megatron.core.models.gpt, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, vocab_size=64)).eval()
model.save_pretrained({str(tmp_path)!r})
loaded = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
tokens = torch.arange(16)[None]
with torch.no_grad():
    same = torch.equal(model(tokens).logits, loaded(tokens).logits)
print(same, torch.equal(model.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq))
"""
    assert run_python(code).splitlines()[-1] == "True True"


def test_torch_compile_stays_available() -> None:
    """The adaptation must not switch torch.compile off for the rest of the process."""
    code = """
import os
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
adapt_megatron_core_to_cpu()
import megatron.core.fusions.fused_bias_swiglu as fused
print("TORCHDYNAMO_DISABLE" in os.environ, type(fused.swiglu).__name__)
"""
    assert run_python(code) == "False function"


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
@pytest.mark.parametrize("name", TRITON_MODULES)
def test_kernels_for_a_gpu_are_importable_without_triton_and_nothing_else_sees_one(name: str, tmp_path: Path) -> None:
    source = tmp_path / "paged_stash.py"
    source.write_text(
        "import triton\nimport triton.language as tl\nimport sys\n"
        "@triton.jit\ndef kernel(SIZE: tl.constexpr): return SIZE\nseen = 'triton' in sys.modules\n"
    )
    code = f"""
import importlib.util
from megatron_cpt.runtime import cpu
loader = cpu._EngineLoader({name!r}, {str(source)!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader({name!r}, loader))
loader.exec_module(module)
print(module.kernel(3), module.seen)
other = cpu._EngineLoader("megatron.core.other", {str(source)!r})
try:
    other.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader("megatron.core.other", other)))
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run_python(code).splitlines() == ["3 False", "triton"]
