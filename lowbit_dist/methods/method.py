"""What every training method says of itself."""

from torch import Tensor, nn

from lowbit_dist.config import MethodOptions
from lowbit_dist.packed import PackedTensor


class Method(MethodOptions):
    """A method is its own configuration section (`method:` in a run's YAML): frozen fields and what they
    mean.
    """

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        """The layer that takes the place of `layer`, which is called `name` in the model."""
        raise TypeError(f"method {self.name} does not say what replaces a linear layer")

    def is_low_bit(self, is_linear: bool) -> bool:
        """Whether a parameter exists only as codes.

        `is_linear`: it is the weight of a linear layer other than the head.
        """
        return False

    def quantize(self, weight: Tensor) -> PackedTensor:
        """The initial codes and scale of a low-bit weight [rows, K] or [K], float32."""
        raise TypeError(f"method {self.name} has no low-bit weights")
