"""One strategy, one file. A new file here is found by class name under ``trainer.callbacks``.

Strategies compose, in any order in the list; they act in this one:

    0   ReplayBuffer         holds rows of past tasks; comes by itself           after a step
    5   RetentionGuard       acts on the trained weights                         after a step, at a task's end
    10  ER | ILoRA | DERPP   add replayed rows: one of them                      loss
    30  LwF                  compares with the adapters of the task's start      loss
    50  EWC, L2SP            pull towards anchors                                gradient
    90  AGEM                 projects what all of the above made of it           gradient, before clipping

The buffer is one, whoever draws from it, each with draws of its own. Refused, each in one line that names
``trainer.callbacks``: a strategy listed twice; two of ER, ILoRA and DERPP, whose losses hold the same replay term;
a ReplayBuffer that nobody uses. Every adapter goes with every strategy, but LoRANullSequence, whose coordinates are new
with every task, with none that compares or averages coordinates (EWC, L2SP, ILoRA, LwF,
RetentionGuard with ``policy: dial``).
"""

from secura_lightning.discover import import_all

import_all(__name__)
