"""Complete a prompt with one or more Hugging Face directories, by plain transformers; JSON on stdout.

    python examples/quickstart/generate.py "PROMPT" MODEL_DIR...

Decoding is greedy, so that only the weights make the difference. `<|endoftext|>` ends the text: it is what
separates documents in training.
"""

from __future__ import annotations

import json
import sys

import transformers

MAX_NEW_TOKENS = 48
DOCUMENT_END = "<|endoftext|>"


def complete(prompt: str, model_dir: str) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True).eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.convert_tokens_to_ids(DOCUMENT_END),
    )[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    prompt, *model_dirs = sys.argv[1:]
    print(json.dumps({"prompt": prompt, "completions": {name: complete(prompt, name) for name in model_dirs}}))
