"""Learning structured preconditioners on the LQR objective."""

from .fit import fit
from .report import FitReport

__all__ = ["FitReport", "fit"]
