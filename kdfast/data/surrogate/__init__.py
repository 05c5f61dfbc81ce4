"""Images to distil on that need no data: procedural generators."""

from kdfast.data.surrogate.breeding import crossover, mutate
from kdfast.data.surrogate.leaves import leaves
from kdfast.data.surrogate.noise import noise
from kdfast.data.surrogate.programs import Instruction, Program, load_programs, save_programs
from kdfast.data.surrogate.shaders import random_programs, shaders, usable, widen

__all__ = [
    "Instruction",
    "Program",
    "crossover",
    "leaves",
    "load_programs",
    "mutate",
    "noise",
    "random_programs",
    "save_programs",
    "shaders",
    "usable",
    "widen",
]
