"""A small Llama in a GGUF file: 32-bit norms and 8-bit matrices, rows of queries and keys in the order of llama.cpp."""

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize, quantize

from mtp_modules import MTPModel, ResidualHeads
from mtp_modules.interop import export_model
from mtp_modules.trunks import HuggingFaceTrunk
from tests.helpers import MAX_POSITIONS, VOCAB, random_tokens, randomise

LAYERS, HEADS, WIDTH = 2, 2, 32


def write(path: Path, model: torch.nn.Module) -> None:
    """Write the model, and give it the numbers that its quantised weights stand for."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        kind = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        stored = quantize(value, kind)
        parameter.data = torch.from_numpy(dequantize(stored, kind).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = stored.reshape(HEADS, 2, -1, stored.shape[1])
            stored = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(stored.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_quantised_weights_are_read_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model)
    write(tmp_path / "small.gguf", model)
    trunk = HuggingFaceTrunk(pretrained=str(tmp_path), gguf_file="small.gguf").eval()
    assert (trunk.d_model, trunk.vocab_size, trunk.max_positions) == (WIDTH, VOCAB, MAX_POSITIONS)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        wanted = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(trunk(tokens).hidden, wanted)
    whole = MTPModel(trunk=trunk, heads=ResidualHeads(d_model=WIDTH, num_horizons=2))
    with torch.no_grad():
        whole.heads.stacks[0][0].linear.weight.normal_()
        export_model(whole.eval(), tmp_path / "medusa", format="medusa")
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "medusa" / "base").eval()
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits)
