"""The layout of a worker's blocks beyond the shapes of its tensors. Two engines that differ in it share no chunk.

The cache does not look into a block. Attention kernels arrange keys and values in it: on a CPU by the instruction set
that they found, elsewhere by backend and by the layout that the engine core chose.
"""

# vLLM is not installed where this is type-checked: pyright: reportMissingImports=false

import hashlib
import platform
from pathlib import Path
from typing import Any

from lmcache_trio.adapters.vllm.groups import specs_of

__all__ = ["layout_extras"]


def layout_extras(vllm_config: Any, kv_cache_config: Any) -> list[str]:
    """Names that go into a worker's fingerprint: kernels of one release of vLLM, run in one way."""
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.platforms import current_platform

    backends = sorted(".".join((each.__module__, each.__qualname__)) for each in get_current_attn_backends(vllm_config))
    extras = [
        f"vllm={vllm.__version__}",
        f"backends={backends}",
        f"kv_dtype={vllm_config.cache_config.cache_dtype}",
        f"layout={getattr(kv_cache_config, 'kv_cache_layout', None)}",
    ]
    if current_platform.is_cpu():
        extras.append(f"isa={_cpu_kernels(vllm_config, kv_cache_config)}")
    return extras


def _cpu_kernels(vllm_config: Any, kv_cache_config: Any) -> str:
    """The instruction sets that vLLM's CPU attention chose; if it does not tell, all those of the CPU."""
    each = [one for group in kv_cache_config.kv_cache_groups for one in specs_of(group.kv_cache_spec)]
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        dtype, cache_dtype = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
        kernels = [one for one in each if hasattr(one, "head_size")]  # states have none
        return str(sorted({_get_attn_isa(dtype, one.block_size, one.head_size, cache_dtype) for one in kernels}))
    except (ImportError, TypeError, AttributeError):
        return f"{platform.machine()} {_cpu_flags()}"


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = {line for line in lines if line.startswith(("flags", "Features"))}
    return hashlib.sha256("\n".join(sorted(flags)).encode()).hexdigest()
