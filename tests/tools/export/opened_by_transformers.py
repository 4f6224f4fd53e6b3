"""What transformers makes of exported folders, in a process without us and without Megatron.

python opened_by_transformers.py FOLDER RESULTS PROMPT NAME...
"""

import sys

import torch


class _Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("megatron", "ultramem_megatron"):
            raise ImportError(f"{name} is blocked")


def opened(folder, tokens):
    """Logits of one forward, in pieces through a cache, of padded texts; and continuations."""
    from transformers import AutoModel, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    padded, mask, lengths = _padded(tokens)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    result = {
        "logits": model(tokens).logits,
        "hidden": torch.equal(decoder(tokens)[0], model.model(tokens)[0]),
        "pieces": _in_pieces(model, tokens),
        "padded": model(padded, attention_mask=mask).logits,
        "eager": None,
        "lengths": lengths,
        "one by one": [
            model.generate(text[None, -n:], **{**options, "attention_mask": None})[0, n:]
            for text, n in zip(padded, lengths, strict=True)
        ],
        "batch": model.generate(padded, **options)[:, padded.shape[1] :],
        "without a cache": model.generate(padded, use_cache=False, **options)[:, padded.shape[1] :],
        "beams": model.generate(padded, num_beams=2, **options),
        "beams without a cache": model.generate(padded, num_beams=2, use_cache=False, **options),
        "dtypes": {name: tensor.dtype for name, tensor in model.state_dict().items()},
    }
    model.model.save_pretrained("alone")
    alone = AutoModel.from_pretrained("alone", trust_remote_code=True, dtype="auto")
    result["alone"] = torch.equal(alone(tokens)[0], decoder(tokens)[0])
    model.set_attn_implementation("eager")
    result["eager"] = model(tokens).logits
    return result


def written(folder, prompt):
    """What a model of text writes, from the folder alone; how its tokenizer pads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, table_memory="disk"
    )
    batch = tokenizer([prompt, prompt[:5]], return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False)
    config = model.generation_config
    return {
        "texts": tokenizer.batch_decode(ids, skip_special_tokens=True),
        "padding": batch["attention_mask"][1, 0].item(),
        "eos": (tokenizer.eos_token_id, config.eos_token_id),
        "room": tokenizer.model_max_length,
        "suppressed": config.suppress_tokens,
        "pages": model.table_pages(),
    }


def _padded(tokens):
    """Texts of other lengths, the padding before them; their mask."""
    batch, length = tokens.shape
    lengths = [length, 3] if batch == 2 else [length]
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, n in enumerate(lengths):
        padded[row, -n:] = tokens[row, :n]
        mask[row, -n:] = 1
    return padded, mask, lengths


def _in_pieces(model, tokens):
    """Logits of three pieces, each seeing those before it in a cache."""
    cache, logits = None, []
    for piece in tokens.split([2, 11, 7], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Blocked())
    _folder, _file, _prompt, *_names = sys.argv[1:]
    _tokens = torch.load(_file)
    with torch.no_grad():
        _found = {name: opened(f"{_folder}/{name}/hf", _tokens) for name in _names}
        if _prompt:
            _found["text"] = written(f"{_folder}/text/hf", _prompt)
        torch.save(_found, _file)
