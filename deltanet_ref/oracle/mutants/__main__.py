from deltanet_ref.oracle.mutants.confusion import main

main()
