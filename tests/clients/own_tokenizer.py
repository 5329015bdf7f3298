"""llama.cpp's convert_hf_to_gguf.py for a model with a tokenizer of its own.

    python own_tokenizer.py LLAMA_CPP PRE_TOKENIZER MODEL [the converter's options]

LLAMA_CPP is the folder of llama.cpp's source. The converter knows a tokenizer by a hash of what it makes of one text, and stops
at any other: PRE_TOKENIZER says instead which of llama.cpp's ways to cut text into words it has (src/llama-vocab.cpp lists
them). The quickstart's cuts as "smollm" does: every digit alone, then GPT-2's words.
"""

import runpy
import sys
from pathlib import Path

import transformers

tools, pre_tokenizer, *options = sys.argv[1:]
sys.path[:0] = [tools, str(Path(tools) / "gguf-py")]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
# transformers 5 writes a class name into tokenizer_config.json that the converter's transformers 4 does not know; tokenizer.json,
# which this class reads, is the same in both
transformers.AutoTokenizer.from_pretrained = transformers.PreTrainedTokenizerFast.from_pretrained
sys.argv = [str(Path(tools) / "convert_hf_to_gguf.py"), *options]
runpy.run_path(sys.argv[0], run_name="__main__")
