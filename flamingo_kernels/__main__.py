"""`python -m flamingo_kernels`: the versions, what was built, and which backends can run here."""

import platform

import torch

import flamingo_kernels as fk
from flamingo_kernels import _backends


def main() -> None:
    rows = [
        ("flamingo_kernels", fk.__version__),
        ("torch", torch.__version__),
        ("triton", _triton_version()),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads, {_gpu()}"),
        ("build", _build()),
        ("cuda build", _cuda_build()),
        ("cpu instruction set", _isa()),
        *((f"backend {name}", state) for name, state in fk.backends().items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    return triton.__version__


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _build() -> str:
    """What setup.py recorded, on one line."""
    record = _backends._build_record()
    if not record:
        return "no record: the package was not installed"
    built = record.get("error") or f"built with torch {record['torch']} by {record['compiler']}"
    return f"FLAMINGO_KERNELS_BUILD={record['requested']}: {built}"


def _cuda_build() -> str:
    record = _backends._build_record()
    return record.get("cuda_error") or record.get("cuda_compiler") or "no record"


def _isa() -> str:
    """The instruction set that the C++ kernels run with."""
    if fk.backends()["cpu"] != "available":
        return "none: the cpu backend is not available"
    from flamingo_kernels import _cpu

    return _cpu.isa()


if __name__ == "__main__":
    main()
