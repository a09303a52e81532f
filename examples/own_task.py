"""A task of one's own: how many words an answer has, and whether it holds a number.

Put the file into remix_cli/tasks and the line `"terse": "remix_cli.tasks.terse:Terse"` into registry.py there. Then
`remix eval RUN --task terse` scores it. With `eval.tasks: [{task: terse}]` and `train.eval_tasks_limit: 50` training
scores it on 50 rows at each evaluation, and `train.metric_for_best_model: terse/words` chooses by it. Rows come from
the task's `source`, or without one from the recipe's held-out rows.
"""

import re

from remix_cli.tasks.base import Generating, Measure


class Terse(Generating):
    name = "terse"
    # A score is the sum of one entry of what `judge` returns over that of another, or over the number of answers.
    measures = (
        Measure("words", "words", "answers", lower_is_better=True, share=False, shown=True),
        Measure("has_number", "correct"),
    )
    row_format = "gsm8k"
    max_new_tokens = 6

    def load(self):
        examples = self.examples()
        self.ask([self.prompt_ids(example) for example in examples])
        self.data = [list(example.messages) for example in examples]

    def judge(self, item, text):
        """`item` is the number of the question, so `self.data[item]` is what `load` kept of it."""
        return {"output": text, "words": len(text.split()), "answers": 1, "correct": bool(re.search("[0-9]", text))}
