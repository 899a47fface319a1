"""Print the labels that trl's trainer and collator give conversations: `python trl_labels.py FILE`, where trl is installed.

FILE has a JSON object: `folder` of a model, `template` of conversations, `records` with messages. Prints a list for each record:
[token ids, labels], -100 where a token does not count.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(given["folder"])
    tokenizer.chat_template = given["template"]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, assistant_only_loss=True, max_length=None, report_to="none", use_cpu=True, bf16=False
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(given["folder"]),
            settings,
            train_dataset=Dataset.from_list(given["records"]),
            processing_class=tokenizer,
        )
        rows = []
        for example in trainer.train_dataset:
            batch = trainer.data_collator([example])
            rows.append([batch["input_ids"][0].tolist(), batch["labels"][0].tolist()])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
