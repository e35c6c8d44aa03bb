"""Published KV-cache systems, one file each. A call such as ``tokenselect(top_k=512)`` gives a ``Method``.

Methods of other packages (see ``kvote.plugins``) are found here as well.
"""

from collections.abc import Callable

from kvote import plugins
from kvote.method import METHODS, Method
from kvote.methods.actqkv import actqkv
from kvote.methods.adakv import adakv
from kvote.methods.cake import cake
from kvote.methods.compresskv import compresskv
from kvote.methods.critic import critic
from kvote.methods.delta import delta
from kvote.methods.dense import dense
from kvote.methods.doublesparsity import doublesparsity
from kvote.methods.duoattention import duoattention
from kvote.methods.ems import ems
from kvote.methods.expectedattention import expectedattention
from kvote.methods.h2o import h2o
from kvote.methods.infllm import infllm
from kvote.methods.keyformer import keyformer
from kvote.methods.kivi import kivi
from kvote.methods.knorm import knorm
from kvote.methods.kvcrush import kvcrush
from kvote.methods.kvzip import kvzip
from kvote.methods.loopserve import loopserve
from kvote.methods.mikv import mikv
from kvote.methods.minference import minference
from kvote.methods.minicache import minicache
from kvote.methods.mpcache import mpcache
from kvote.methods.offload import offload
from kvote.methods.oracle import oracle
from kvote.methods.prefixkv import prefixkv
from kvote.methods.pyramidkv import pyramidkv
from kvote.methods.quest import quest
from kvote.methods.random import random
from kvote.methods.randomkeep import randomkeep
from kvote.methods.razorattention import razorattention
from kvote.methods.rotatekv import rotatekv
from kvote.methods.sentencekv import sentencekv
from kvote.methods.snapkv import snapkv
from kvote.methods.sparq import sparq
from kvote.methods.streamingllm import streamingllm
from kvote.methods.think import think
from kvote.methods.tidaldecode import tidaldecode
from kvote.methods.tim import tim
from kvote.methods.tokenselect import tokenselect
from kvote.methods.xkv import xkv
from kvote.methods.zipcache import zipcache

__all__ = [
    "actqkv",
    "adakv",
    "cake",
    "compresskv",
    "critic",
    "delta",
    "dense",
    "doublesparsity",
    "duoattention",
    "ems",
    "expectedattention",
    "h2o",
    "infllm",
    "keyformer",
    "kivi",
    "knorm",
    "kvcrush",
    "kvzip",
    "loopserve",
    "mikv",
    "minference",
    "minicache",
    "mpcache",
    "offload",
    "oracle",
    "prefixkv",
    "pyramidkv",
    "quest",
    "random",
    "randomkeep",
    "razorattention",
    "rotatekv",
    "sentencekv",
    "snapkv",
    "sparq",
    "streamingllm",
    "think",
    "tidaldecode",
    "tim",
    "tokenselect",
    "xkv",
    "zipcache",
]


def __getattr__(name: str) -> Callable[..., Method]:
    if name.startswith("_") or name not in plugins.names():
        raise AttributeError(f"module 'kvote.methods' has no attribute {name!r}")
    plugins.load(name)
    return METHODS[name].build
