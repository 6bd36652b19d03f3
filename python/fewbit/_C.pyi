"""
fewbit's native module: importing it registers the torch operators.
"""
from __future__ import annotations

__all__: list[str] = ['available_isas', 'cuda', 'isa', 'panel_rows', 'set_isa']
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
__version__: str = '0.1.0'
cuda: bool = False
panel_rows: int = 16
