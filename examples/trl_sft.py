"""Train a routed pool of LoRAs with TRL's SFTTrainer.

    python examples/trl_sft.py

The model here is tiny and random and the rows are made up, so that it runs anywhere; put your own in their places.
"""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from remix_cli.integrations import AdapterConfig, RemixSFTTrainer, RouterTraining, get_remix_model


def tiny_base() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Yours: AutoModelForCausalLM.from_pretrained(NAME), AutoTokenizer.from_pretrained(NAME)."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "?", *map(str, range(30))])}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="?")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)), tokenizer


def main(output_dir: str = "runs/trl-sft", steps: int = 60) -> list[float]:
    base, tokenizer = tiny_base()
    rows = Dataset.from_list([{"prompt": f"{i % 9} {i % 7} ?", "completion": f" {i % 9 + i % 7}"} for i in range(200)])

    model = get_remix_model(base, AdapterConfig(pool_size=8, active=4, rank=8))
    model.print_trainable_parameters()
    trainer = RemixSFTTrainer(
        model,
        SFTConfig(output_dir, max_steps=steps, learning_rate=1e-2, logging_steps=10, bf16=False, report_to="none"),
        router=RouterTraining(selections=2, learning_rate=0.3),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # RemixModel.from_pretrained(base, output_dir) reads it
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    main()
