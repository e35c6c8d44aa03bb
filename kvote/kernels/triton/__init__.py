from kvote.kernels.triton.decode import decode
from kvote.kernels.triton.sketch import SKETCH_TOKENS, sketch, sketch_bytes
from kvote.kernels.triton.votes import select, top_k, votes
