"""Will this flight arrive more than 15 minutes late?"""

from flights.data import load_data
from flights.model import Model

__all__ = ["Model", "load_data"]
