# In a checkout the package bnfx.passes lies in ../passes; this tells type checkers so.
from passes import *
