"""Lazy operators of the layered linear-quadratic problem. They know torch only."""

from .base import MatrixFreeOperator, SubmatrixOperator, TransposedOperator, ZeroOperator
from .compiled import CompiledOperator, compiled
from .condensed_hessian import CondensedHessianOperator
from .control import ControlOperator
from .control_cost import ControlCost
from .control_hessian import ControlCostOperator, ControlHessianOperator
from .cross_hessian import CrossHessianOperator
from .cross_kernel import CrossKernelOperator
from .from_function import FunctionOperator, from_function
from .gain import GainOperator
from .graphed import GraphedOperator, graphed
from .hessian_block import HessianBlockOperator
from .output_jacobian import OutputJacobianOperator
from .scipy_bridge import to_scipy
from .stage import OperatorStage, Stage, StateCost
from .state_curvature import StateCurvatureOperator
from .state_hessian import StateHessianOperator
from .system import System, Trajectory
from .tangent_kernel import TangentKernelOperator
from .transition import TransitionOperator
from .value import ValueOperator

__all__ = [
    "CompiledOperator",
    "CondensedHessianOperator",
    "ControlCost",
    "ControlCostOperator",
    "ControlHessianOperator",
    "ControlOperator",
    "CrossHessianOperator",
    "CrossKernelOperator",
    "FunctionOperator",
    "GainOperator",
    "GraphedOperator",
    "HessianBlockOperator",
    "MatrixFreeOperator",
    "OperatorStage",
    "OutputJacobianOperator",
    "Stage",
    "StateCost",
    "StateCurvatureOperator",
    "StateHessianOperator",
    "SubmatrixOperator",
    "System",
    "TangentKernelOperator",
    "Trajectory",
    "TransitionOperator",
    "TransposedOperator",
    "ValueOperator",
    "ZeroOperator",
    "compiled",
    "from_function",
    "graphed",
    "to_scipy",
]
