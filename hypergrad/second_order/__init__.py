"""Products with the second derivatives of a training loss."""

from hypergrad.second_order.base import Products
from hypergrad.second_order.differences import FiniteDifference
from hypergrad.second_order.exact import Exact
from hypergrad.second_order.gauss_newton import GaussNewton

__all__ = ["Exact", "FiniteDifference", "GaussNewton", "Products"]
