"""
fewbit's native module: importing it registers the torch operators.
"""
from __future__ import annotations

__all__: list[str] = [
    'allow_unverified', 'available_isas', 'cuda', 'isa', 'panel_rows', 'set_isa',
    'set_verified'
]
def allow_unverified(on: bool) -> None:
    """
    Let every CUDA kernel run on every card.
    """
def available_isas() -> list:
    """
    What this CPU and this build can run, worst first.
    """
def isa() -> str:
    """
    The instruction set whose kernels run.
    """
def set_isa(name: str) -> None:
    """
    Choose an instruction set of available_isas().
    """
def set_verified(op: str, architecture: int) -> None:
    """
    Let the CUDA kernel of `op` run on cards of compute capability `architecture` (75, ..).
    """
__version__: str = '0.1.0'
cuda: bool = False
panel_rows: int = 16
