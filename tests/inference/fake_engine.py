"""An engine without a model."""

from types import SimpleNamespace

import numpy as np

from mla_moe.inference.engine import Engine
from mla_moe.text.tokenizer import ByteTokenizer


class FakeEngine:
    """It checks requests as the real one does, and generates `aaa…`, or fails with `failure`."""

    max_num_seqs, max_model_len, cfg, num_running = 4, 64, SimpleNamespace(vocab_size=258), 0
    occupancy, num_preemptions, _adapters = (0, 0), 0, ()
    check = Engine.check

    def __init__(self, failure=None):
        self.waiting, self.failure = [], failure

    def _detokenize(self, ids):
        return ByteTokenizer().decode(ids)

    def enqueue(self, completion):
        self.waiting.append(completion)

    def abort(self, completion):
        completion.finish_reason = completion.finish_reason or "abort"

    @property
    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        if self.failure is not None:
            raise self.failure
        running, self.waiting = self.waiting, []
        for completion in running:
            request, floats, integers = completion.request, np.zeros(3, np.float32), np.zeros(1, np.int32)
            floats[:] = request.temperature, request.top_p, request.min_p
            integers[0] = request.top_k
            completion.append_tokens([97] * request.max_new_tokens, [0.0] * request.max_new_tokens)
        return running
