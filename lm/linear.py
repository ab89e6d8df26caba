"""The matrix that everything in lm/ is made of: no bias, no initialisation of its own."""

from torch import nn


class Linear(nn.Linear):
    """nn.Linear without bias. LanguageModel draws all matrices once; a trillion parameters are 70,000 of them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass
