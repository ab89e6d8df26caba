"""The two matrices that everything in lm/ is made of, without an initialisation of their own.

LanguageModel draws all matrices once (a trillion parameters are 70,000 of them). It also matters on the meta device,
where drawing an embedding makes torch import a symbolic-algebra library: a second and 150 MB for nothing.
"""

from torch import nn


class Linear(nn.Linear):
    """nn.Linear without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding."""

    def reset_parameters(self) -> None:
        pass
