"""Sub-networks that are judged together compute what they have in common once."""

from widthkit.search.sharing.candidates import Candidates, sharing_order
from widthkit.search.sharing.memo import Unsafe

__all__ = ["Candidates", "Unsafe", "sharing_order"]
