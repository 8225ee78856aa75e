module kelson.example/tests/peers/v3.5

go 1.26.0
