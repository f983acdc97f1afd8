"""One module for each kind of recording, found by being here.

A kind has `KIND`, its name; `WEIGHTS`, the weights of cases that name none; `matches(name, meta)`; and
`differences(meta, tensors, weights_folder)`, the largest absolute difference of each thing that was recorded, `inf`
where one is missing or of another shape.
"""
