"""A small engine, and a server of it; modules may have their own."""

import dataclasses

import pytest
from flax import nnx

from mla_moe import Transformer
from mla_moe.inference.engine import Engine


@pytest.fixture(scope="module")
def engine(cfg):
    from .serving import MAX_MODEL_LEN, decode  # needs the extra `serve`

    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    return Engine(model, max_num_seqs=4, max_model_len=MAX_MODEL_LEN, decode=decode)


@pytest.fixture(scope="module")
def port(engine):
    from .serving import TOKENIZER, server, serving

    with serving(server.application(engine, TOKENIZER, "tiny", max_waiting=250)) as port:
        yield port
