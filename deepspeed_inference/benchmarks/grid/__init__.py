"""One tool for all layouts: model × ranks × layout × prompt × output × batch × codec × link, measured and presented.

A YAML names the axes (`config`), their product is cells (`cells`). Cells that are compared form a block, whose rounds
are interleaved on the same ranks (`rank_work`), each answered by a system (`systems`) on a clock (`token_clock`) and
summed up (`figures`). What is done stands in a journal (`journal`), so that a crash costs one cell and a run can go on
(`running`). `presentation` makes the table, plots and page of the record.
"""
